"""Check class labels, whether files, data sets or batches have them."""

from __future__ import annotations

import operator
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.errors import counted, printable, some

# A larger head would fill the memory.
MOST_CLASSES = 1_000_000

# The ways out for other labels.
OWN_LOSS = "are for fast.Adaptation(..., loss=), docs/any-loss.md"
NUMBER_THEM = "number the names: classes, labels = numpy.unique(names, return_inverse=True)"
SEVERAL = (
    "fast finetune adapts to one label for each sample. With several, train by "
    "fast.Adaptation(..., loss=torch.nn.functional.binary_cross_entropy_with_logits): "
    "docs/any-loss.md"
)

# A few samples of a source task with up to this many classes are no reason for doubt.
FEW_CLASSES = 10_000


def check_labels(labels: Any, num_classes: int | None, name: str) -> Tensor:
    """Labels as int64 `[N]`.

    Args:
        labels: a tensor, array or list of numbers `[N]` or `[N, 1]`.
        num_classes: every label must be below this; None: any label that is not negative will do.
        name: what messages call the data.

    Raises:
        ValueError: labels are no numbers, NaN, fractional, of another shape, or out of range; the
            message names the first such row.
    """
    labels = labels if isinstance(labels, Tensor) else _from_array(np.asarray(labels), name)
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 1:
        several = "several labels of a sample" if labels.dim() == 2 else "labels of each position"
        raise ValueError(
            f"{name}: labels must be class indices of shape [N]; got shape {list(labels.shape)}; "
            + ("of one-hot labels give the argmax; " if labels.dim() == 2 else "")
            + f"{several} {OWN_LOSS}"
        )
    labels = whole_labels(labels, name)
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (num_classes is not None and high >= num_classes):
            bound = f"0..{num_classes - 1}" if num_classes is not None else "0 or more"
            wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
            row = _first(wrong)
            raise ValueError(
                f"{name}: labels must be {bound}; got {low}..{high}, first {int(labels[row])} in "
                f"row {row}. Number the classes from 0, and count all of them (num_classes; in an "
                ".npz the names in `classes`)"
            )
    return labels


def check_several(outputs: int, name: str) -> None:
    """Raise ValueError where a network has one output: softmax makes a sure class of any number."""
    if outputs < 2:
        raise ValueError(
            f"{name}: the network has one output, and so no classes to choose from: it is a "
            "regression, or the logit of yes against no. Call it yourself (for the source's task "
            "inside fast.source_task(model))"
        )


def whole_labels(labels: Tensor, name: str) -> Tensor:
    """Labels `[N, ...]` as int64.

    Raises:
        ValueError: some are complex, NaN, infinite or fractional.
    """
    if labels.is_complex():
        raise ValueError(
            f"{name}: labels must be whole numbers (class indices), not {labels.dtype}"
        )
    if labels.is_floating_point():
        for word, wrong in (("NaN", labels.isnan()), ("infinite", labels.isinf())):
            if wrong.any():
                raise ValueError(
                    f"{name}: {counted(int(wrong.sum()), 'label is', 'labels are')} {word}, the "
                    f"first in row {_first(wrong)}; drop those rows"
                )
        if (labels != labels.round()).any():
            raise ValueError(
                f"{name}: labels must be whole numbers (class indices); got fractions, as "
                f"{float(labels[labels != labels.round()][0]):g}; numbers to predict {OWN_LOSS}"
            )
    return labels.long()


def check_num_classes(num_classes: Any, least: int = 2) -> int:
    """The number of classes of a head, as an int.

    Args:
        least: the smallest number; a head whose outputs are no classes may have one.

    Raises:
        TypeError: `num_classes` is no whole number.
        ValueError: it is less than `least`, or more than `MOST_CLASSES`.
    """
    try:
        number = operator.index(num_classes)
    except TypeError as error:
        raise TypeError(f"num_classes must be a whole number; got {num_classes!r}") from error
    if number < least:
        raise ValueError(f"num_classes must be at least {least}; got {number}")
    if number > MOST_CLASSES:
        raise ValueError(f"num_classes must be at most {MOST_CLASSES}; got {number}")
    return number


def count_classes(top: int, samples: int, name: str) -> int:
    """The number of classes, `top + 1`.

    Args:
        top: the largest label.
        samples: the number of samples.
        name: what the message calls the data.

    Raises:
        ValueError: there are far more classes than samples, and such a head would fill the memory.
    """
    if top >= min(MOST_CLASSES, max(FEW_CLASSES, 10 * samples)):
        there = counted(samples, "sample")
        raise ValueError(
            f"{name}: label {top} among {there}: labels are class indices, and so few samples "
            f"cannot teach a head of {top + 1} classes; number the classes from 0"
        )
    return top + 1


def _from_array(labels: np.ndarray, name: str) -> Tensor:
    if labels.dtype.kind not in "fiub":
        raise ValueError(
            f"{name}: labels must be class indices 0, 1, ...; got {labels.dtype}; {NUMBER_THEM}"
        )
    # Files hold types and byte orders that torch does not have.
    return torch.from_numpy(labels.astype(np.float64 if labels.dtype.kind == "f" else np.int64))


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0, 0])


def class_places(classes: Sequence[str], own: Sequence[str]) -> list[int | None]:
    """The place of each class of data among a network's own: by its name, or where names are
    numbers and no names of the network, by that number. None where it is not found.

    Libraries have several names for a class (`tench, Tinca tinca`), of which the first one counts.
    Capitals, and underscores in place of spaces, do not. A name that is then ambiguous is none.
    """
    exact = {name: i for i, name in enumerate(own)}
    rough = {_plain(name): i for name, i in exact.items()}
    twice = {p for names in (own, classes) for p, n in Counter(map(_plain, names)).items() if n > 1}
    places = [
        exact.get(name, None if _plain(name) in twice else rough.get(_plain(name)))
        for name in classes
    ]
    if None in places and all(name.isdecimal() for name in classes):
        return [int(name) for name in classes]
    return places


def places_by_order(where: str, classes: Sequence[str], own: Sequence[str] | None) -> str:
    """A note that the classes of data are taken for a network's own in their order.

    Args:
        where: what messages call the data.
        own: names of the network's classes, which are others; None where it has none.

    Raises:
        ValueError: the name of a class says that it is in another place.
    """
    places = class_places(classes, own or ())
    moved = [i for i, place in enumerate(places) if place not in (None, i)]
    if moved:
        strange = [name for name, place in zip(classes, places, strict=True) if place is None]
        raise ValueError(
            f"{where}: {printable(classes[moved[0]])} is class {places[moved[0]]} of the network, "
            f"and {some(strange)} none of its {len(own or ())}: name the classes as the network "
            "does, or by its numbers"
        )
    why = f"which it calls {some(own)}" if own else "whose names are not known"
    return (
        f"{where}: the classes {some(classes)} are taken in this order for the network's outputs "
        f"0..{len(classes) - 1}, {why}: if that is wrong, name them by these numbers"
    )


def _plain(name: str) -> str:
    words = name.partition(",")[0].replace("_", " ").split()
    return unicodedata.normalize("NFC", " ".join(words).casefold())
