"""Labelled data as they are read, before they are prepared for a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from fast.data.labels import check_labels, count_classes
from fast.data.trees import length, pick
from fast.errors import counted, printable, some


@dataclass(frozen=True)
class EncodedFiles:
    """`N` samples still to be decoded; `open(i)` returns a file name or a binary stream."""

    names: Sequence[str]
    open: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: np.ndarray) -> Self:
        return type(self)(
            names=[self.names[i] for i in index], open=lambda i: self.open(int(index[i]))
        )


class EncodedImages(EncodedFiles):
    """Images still to be decoded."""


class EncodedAudio(EncodedFiles):
    """Sounds still to be decoded."""


# How `held_out` ends where that was drawn from the training samples.
DRAWN = "of each class"


@dataclass(kw_only=True)
class FileReport:
    """What turned up while samples were read and prepared.

    Attributes:
        skips: files that cannot be read are left out, as long as others can; else they are an
            error.
        broken: name -> reason, of the files that cannot be read.
        sizes: (width, height) of images as stored.
        kind: what the files should be: image or sound.
        cut: how many texts or sounds were longer than they are read.
    """

    skips: bool = True
    kind: str = "image"
    broken: dict[str, str] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    cut: int = 0

    def check(self, any_read: bool) -> None:
        """Raise ValueError where files cannot be read, and that is an error.

        Args:
            any_read: whether another one could be read.
        """
        if not self.broken or (self.skips and any_read):
            return
        name, reason = next(iter(self.broken.items()))
        message = f"{printable(name)}: not a readable {self.kind} ({printable(reason)}); remove or "
        message += "replace it"
        if len(self.broken) > 1:
            others = some(list(self.broken)[1:], 9)
            message += f"; {len(self.broken)} cannot be read, also {others}"
        raise ValueError(message + ("" if self.skips else " (or go on without: --skip-broken)"))

    @classmethod
    def merged(cls, reports: Iterable[FileReport], skips: bool = True) -> FileReport:
        """One report of several splits."""
        whole = cls(skips=skips)
        for report in reports:
            whole.broken |= report.broken
            whole.sizes |= report.sizes
            whole.cut += report.cut
            whole.kind = report.kind if report.broken else whole.kind
        return whole


@dataclass(frozen=True, kw_only=True)
class Split:
    """`N` inputs of one kind with their labels.

    Attributes:
        inputs: uint8 images `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`; `EncodedImages`;
            `EncodedAudio`; a list of strings; arrays that the network takes as they are (floats, or
            token ids); or a dict of such arrays, for networks whose forward takes several.
        labels: int64 `[N]`, in `0 .. len(classes) - 1`.
    """

    inputs: Any
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> Split:
        return Split(inputs=pick(self.inputs, index), labels=self.labels[index])


@dataclass(frozen=True, kw_only=True)
class NamedData:
    """What a name on the command line stands for.

    Attributes:
        name: as the user wrote it.
        splits: train, val, or both of them.
        classes: names of the labels 0, 1, ...
        held_out: where val comes from.
        notes: what was left out or guessed while reading, one line each.
        sorted_names: the labels number the names of the classes in their order; False if the data
            number the classes themselves.
        has_labels: False if the data have no labels, or none that can be used; the labels of the
            splits then mean nothing.
        samples_hash: the same for the same samples, wherever they are, where `files.samples_hash`
            was called; a large folder takes long.
    """

    name: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...]
    held_out: str = ""
    notes: tuple[str, ...] = ()
    sorted_names: bool = False
    has_labels: bool = True
    samples_hash: str = ""

    @classmethod
    def unlabelled(cls, name: str, inputs: Any, notes: tuple[str, ...] = ()) -> NamedData:
        """Inputs alone.

        Raises:
            ValueError: there are none.
        """
        split = labelled(inputs, np.zeros(length(inputs), np.int64), name)
        splits = {"train": split}
        return cls(name=name, splits=splits, classes=(), notes=notes, has_labels=False)

    @property
    def train(self) -> Split | None:
        return self.splits.get("train")

    @property
    def val(self) -> Split | None:
        return self.splits.get("val")

    def with_val(self, fraction: float, seed: int = 0) -> NamedData:
        """The same data with a val split: if there is none, `fraction` of each class moves there
        from train. A fraction of 0 moves nothing.
        """
        if self.val is not None or self.train is None or fraction == 0:
            return self
        train, val = stratified_split(self.train, fraction, seed)
        held_out = f"{100 * fraction:g} % {DRAWN}"
        return replace(self, splits={"train": train, "val": val}, held_out=held_out)

    def for_training(self) -> Split:
        """The train split; the val split where there is none."""
        return self.splits["train" if "train" in self.splits else "val"]

    def for_evaluation(self) -> Split:
        """The val split; the train split where there is none."""
        return self.splits["val" if "val" in self.splits else "train"]

    @property
    def description(self) -> dict[str, Any]:
        """What was read, as plain values: the classes in the order of their labels, the number of
        samples of each class by split, where val comes from, the notes, and the hash.
        """
        count = len(self.classes)
        return {
            "name": self.name,
            "classes": list(self.classes),
            "samples": {
                name: np.bincount(split.labels, minlength=count).tolist()
                for name, split in self.splits.items()
            },
            "held_out": self.held_out,
            "notes": list(self.notes),
            "samples_hash": self.samples_hash,
        }


def is_drawn(description: Mapping[str, Any]) -> bool:
    """Whether what was held out was drawn from the training samples.

    Args:
        description: `NamedData.description`.
    """
    return str(description.get("held_out")).endswith(DRAWN)


def stratified_split(split: Split, fraction: float, seed: int = 0) -> tuple[Split, Split]:
    """`(rest, part)`: `part` has `fraction` of every class, at least one sample where it has two.

    Raises:
        ValueError: the fraction is not between 0 and 1, or no class has two samples.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the share held out must be between 0 and 1; got {fraction}")
    rng = np.random.default_rng(seed)
    part = []
    for label in np.unique(split.labels):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        count = max(round(len(members) * fraction), 1) if len(members) > 1 else 0
        part.append(members[: min(count, len(members) - 1)])
    held_out = np.zeros(len(split), dtype=bool)
    held_out[np.concatenate(part)] = True
    if not held_out.any():
        raise ValueError(
            f"cannot hold out validation data: each class has a single sample ({len(split)} in "
            "all); --val-fraction 0 trains on all of them"
        )
    return split.subset(np.flatnonzero(~held_out)), split.subset(np.flatnonzero(held_out))


def fold_rows(labels: np.ndarray, folds: int, seed: int = 0) -> list[np.ndarray]:
    """Row numbers of each of `folds` parts, which have about as many samples of every class.

    Raises:
        ValueError: there are fewer samples than parts.
    """
    if len(labels) < folds:
        raise ValueError(f"{counted(len(labels), 'sample')} cannot be split into {folds} parts")
    rng = np.random.default_rng(seed)
    part = np.empty(len(labels), dtype=np.int64)
    count = 0
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        part[members] = (count + np.arange(len(members))) % folds
        count += len(members)
    return [np.flatnonzero(part == i) for i in range(folds)]


def labelled(inputs: Any, labels: Any, where: str, num_classes: int | None = None) -> Split:
    """A `Split` of inputs and labels.

    Raises:
        ValueError: they do not fit together, or the labels are no class indices.
    """
    checked = check_labels(labels, num_classes, where)
    count = length(inputs)
    if len(checked) != count:
        raise ValueError(f"{where}: {count} inputs but {len(checked)} labels")
    if count == 0:
        raise ValueError(f"{where}: is empty")
    return Split(inputs=inputs, labels=checked.numpy())


def numbered_classes(splits: Sequence[Split], where: str) -> tuple[str, ...]:
    """`("0", "1", ...)` up to the largest label.

    Raises:
        ValueError: there would be far more classes than samples.
    """
    top = max(int(s.labels.max()) for s in splits)
    return tuple(map(str, range(count_classes(top, sum(map(len, splits)), where))))
