"""An evaluation compares a network's answers to labelled data with the labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15  # equal parts of the confidences 0..1


class ClassScore(NamedTuple):
    """How well one class is recognised: the number of its samples; recall, the share of them that
    was recognised; precision, the share of right answers among those that name the class (None
    where none does); and f1, the harmonic mean of the two."""

    name: str
    samples: int
    recall: float
    precision: float | None
    f1: float


class Mistake(NamedTuple):
    """A sample that got a wrong answer: its row and name, its label, the class that was predicted
    in its place, and the probabilities that the network gave to both."""

    row: int
    name: str
    label: str
    predicted: str
    probability: float
    probability_of_label: float


@dataclass(kw_only=True, repr=False)
class Evaluation:
    """The answers to N labelled samples, and the figures that follow from them.

    Attributes:
        task: the task that was asked: target, source or both.
        classes: names of the C classes.
        labels: int64 `[N]`.
        logits: float32 `[N, C]`.
        names: names of the samples, or None.
        raw: the samples as they are stored, where they were read by name.
        unreadable: for each file that was left out, the reason.
    """

    task: str
    classes: list[str]
    labels: Tensor
    logits: Tensor
    names: list[str] | None = None
    raw: Any = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.task}: accuracy={self.accuracy:.4f}, loss={self.loss:.4f}, "
            f"calibration_error={self.calibration_error:.4f}, samples={len(self.labels)})"
        )

    @cached_property
    def probabilities(self) -> Tensor:
        """The softmax of the logits, `[N, C]`."""
        return self.logits.softmax(1)

    @cached_property
    def predicted(self) -> Tensor:
        """The most likely class of each sample, int64 `[N]`."""
        return self.logits.argmax(1)

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return int((self.predicted == self.labels).sum()) / len(self.labels)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return float(F.cross_entropy(self.logits.double(), self.labels))

    @cached_property
    def confusion(self) -> Tensor:
        """How often the class of the row was taken for the class of the column, int64 `[C, C]`."""
        count = len(self.classes)
        pairs = self.labels * count + self.predicted
        return torch.bincount(pairs, minlength=count * count).view(count, count)

    @property
    def per_class(self) -> list[ClassScore]:
        """The scores of the classes that have samples or were predicted."""
        right, truly, answered = (
            torch.bincount(x, minlength=len(self.classes)).tolist()
            for x in (self.labels[self.labels == self.predicted], self.labels, self.predicted)
        )
        return [
            ClassScore(
                name,
                truly[i],
                right[i] / truly[i] if truly[i] else 0.0,
                right[i] / answered[i] if answered[i] else None,
                2 * right[i] / (truly[i] + answered[i]),
            )
            for i, name in enumerate(self.classes)
            if truly[i] or answered[i]
        ]

    def reliability(self, bins: int = BINS) -> list[tuple[int, float, float]]:
        """Confidence against accuracy: 0..1 is cut into `bins` equal parts, and each part in which
        confidences lie gives their number, their mean and the accuracy of these answers. The upper
        border belongs to a part."""
        confidence = self.probabilities.double().max(1).values
        right = (self.predicted == self.labels).double()
        part = (confidence * bins).ceil().long().clamp(1, bins)
        rows = []
        for i in range(1, bins + 1):
            inside = part == i
            if inside.any():
                mean, accuracy = confidence[inside].mean(), right[inside].mean()
                rows.append((int(inside.sum()), float(mean), float(accuracy)))
        return rows

    @property
    def calibration_error(self) -> float:
        """The expected calibration error in 0..1: the mean distance of confidence and accuracy over
        15 equal parts of 0..1 (Guo et al. 2017, arXiv 1706.04599)."""
        rows = self.reliability()
        return sum(n * abs(accuracy - mean) for n, mean, accuracy in rows) / len(self.labels)

    def mistakes(self, most: int | None = None) -> list[Mistake]:
        """The wrong answers, those with the most confidence first."""
        wrong = (self.predicted != self.labels).nonzero()[:, 0]
        confidence = self.probabilities[wrong, self.predicted[wrong]]
        order = wrong[confidence.argsort(descending=True, stable=True)][:most]
        return [self._mistake(row) for row in order.tolist()]

    def _mistake(self, row: int) -> Mistake:
        label, predicted = int(self.labels[row]), int(self.predicted[row])
        return Mistake(
            row,
            str(row) if self.names is None else self.names[row],
            self.classes[label],
            self.classes[predicted],
            float(self.probabilities[row, predicted]),
            float(self.probabilities[row, label]),
        )

    def confused(self, most: int = 10) -> list[tuple[str, str, int]]:
        """Pairs of classes with the number of samples of the first class that were taken for the
        second, the largest number first."""
        off = self.confusion.clone()
        off.fill_diagonal_(0)
        values, places = off.flatten().sort(descending=True, stable=True)
        pairs = zip(places[:most].tolist(), values[:most].tolist(), strict=True)
        count = len(self.classes)
        return [(self.classes[p // count], self.classes[p % count], n) for p, n in pairs if n]
