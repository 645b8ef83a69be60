"""How good the answers to labelled data are."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15


class ClassScore(NamedTuple):
    """One class: its samples, the share of them that was recognised (recall), the share of right
    answers among those that name it (precision; None where none does), and their harmonic mean."""

    name: str
    samples: int
    recall: float
    precision: float | None
    f1: float


class Mistake(NamedTuple):
    """A sample that was answered wrongly: its row and name, both classes, and the probabilities
    that the network gave to each."""

    row: int
    name: str
    label: str
    predicted: str
    probability: float
    probability_of_label: float


@dataclass(kw_only=True, repr=False)
class Evaluation:
    """Answers to N labelled samples, and what they come to.

    Attributes:
        task: target or source.
        classes: names of the C classes.
        labels: int64 `[N]`.
        logits: float32 `[N, C]`.
        names: of the samples, or None.
        raw: the samples as stored, where they were read by name.
        unreadable: file -> reason, of files that were left out.
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
        """`[N, C]`."""
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
        """int64 `[C, C]`: samples of the class of the row that were taken for that of the
        column."""
        count = len(self.classes)
        pairs = self.labels * count + self.predicted
        return torch.bincount(pairs, minlength=count * count).view(count, count)

    @property
    def per_class(self) -> list[ClassScore]:
        """The score of each class that has samples or was answered."""
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
        """Samples, mean confidence and accuracy of those whose confidence is in each of `bins`
        equal parts of 0..1 (the upper border belongs to a part); parts without samples are left
        out."""
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
        """Wrong answers, those with the most confidence first."""
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
        """Pairs of classes with the number of samples of the first that were taken for the second,
        the largest first."""
        off = self.confusion.clone()
        off.fill_diagonal_(0)
        values, places = off.flatten().sort(descending=True, stable=True)
        pairs = zip(places[:most].tolist(), values[:most].tolist(), strict=True)
        count = len(self.classes)
        return [(self.classes[p // count], self.classes[p % count], n) for p, n in pairs if n]
