"""Labelled data as read, before a network has a say in how they are prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

VAL_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class EncodedImages:
    """`N` images still to be decoded; `open(i)` yields a file name or a binary stream."""

    names: Sequence[str]
    open: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, index: np.ndarray) -> EncodedImages:
        return EncodedImages([self.names[i] for i in index], lambda i: self.open(int(index[i])))


@dataclass(frozen=True)
class Split:
    """`N` inputs of one kind with their labels.

    inputs: uint8 images `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`; `EncodedImages`; a list of
        strings; arrays handed to the network as they are (float, or token ids); or a dict of such
        arrays, for networks whose forward takes several.
    labels: int64 `[N]`, in `0 .. len(classes) - 1`.
    """

    inputs: Any
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> Split:
        return Split(_take(self.inputs, index), self.labels[index])


@dataclass(frozen=True)
class NamedData:
    """What a name on the command line stands for: up to two splits, and the class names."""

    name: str
    train: Split | None
    val: Split | None
    classes: tuple[str, ...]

    def with_val(self, fraction: float, seed: int = 0) -> NamedData:
        """Itself if it has a val split; else with `fraction` of each class moved there."""
        if self.val is not None or self.train is None:
            return self
        train, val = stratified_split(self.train, fraction, seed)
        return NamedData(self.name, train, val, self.classes)

    def for_evaluation(self) -> Split:
        """The held-out split; all there is where nothing is held out."""
        split = self.val if self.val is not None else self.train
        assert split is not None, "load_data returns at least one split"
        return split


def stratified_split(split: Split, fraction: float, seed: int = 0) -> tuple[Split, Split]:
    """`(rest, part)`: `fraction` of every class in `part`, at least one sample if it has two."""
    if not 0 < fraction < 1:
        raise ValueError(f"the share held out must be between 0 and 1; got {fraction}")
    rng = np.random.default_rng(seed)
    part = []
    for label in np.unique(split.labels):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        count = max(round(len(members) * fraction), 1) if len(members) > 1 else 0
        part.append(members[:count])
    held_out = np.zeros(len(split), dtype=bool)
    held_out[np.concatenate(part)] = True
    if not held_out.any():
        raise ValueError(
            f"cannot hold out validation data: each class has a single sample ({len(split)} in all)"
        )
    return split.subset(np.flatnonzero(~held_out)), split.subset(np.flatnonzero(held_out))


def check_labels(labels: Any, count: int, where: str, num_classes: int | None = None) -> np.ndarray:
    """Labels as int64 `[count]`, or a ValueError that says what is wrong with which of them."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(
            f"{where}: labels must have one dimension; got shape {labels.shape}"
            + ("; for one-hot labels, store their argmax" if labels.ndim == 2 else "")
        )
    if len(labels) != count:
        raise ValueError(f"{where}: {count} inputs but {len(labels)} labels")
    if count == 0:
        raise ValueError(f"{where}: is empty")
    if labels.dtype.kind == "f":
        if np.isnan(labels).any():
            first = int(np.flatnonzero(np.isnan(labels))[0])
            raise ValueError(f"{where}: label {first} is NaN; drop or fix unlabelled samples")
        if not (labels == np.trunc(labels)).all():
            raise ValueError(
                f"{where}: labels must be class numbers; got {labels.dtype} with fractions"
            )
    elif labels.dtype.kind not in "iub":
        raise ValueError(
            f"{where}: labels must be class numbers 0, 1, ...; got {labels.dtype} "
            "(names go into an array `classes`)"
        )
    labels = labels.astype(np.int64)
    limit = num_classes if num_classes is not None else np.iinfo(np.int64).max
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        most = f"0 .. {limit - 1}" if num_classes is not None else "0 or more"
        raise ValueError(
            f"{where}: label {labels[wrong[0]]} of sample {wrong[0]} is out of range: must be "
            f"{most}"
        )
    return labels


def _take(inputs: Any, index: np.ndarray) -> Any:
    if isinstance(inputs, dict):
        return {name: value[index] for name, value in inputs.items()}
    if isinstance(inputs, EncodedImages):
        return inputs.subset(index)
    if isinstance(inputs, list):
        return [inputs[i] for i in index]
    return inputs[index]
