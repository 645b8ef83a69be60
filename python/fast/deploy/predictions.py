"""The answers of a network: the class of each input, and the probabilities of all classes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fast.errors import printable
from fast.files import atomic_file


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one input.

    Attributes:
        name: what the input is called: a file, a text, or its number.
        label: the most likely class.
        probability: the probability of that class, in 0..1.
        top: pairs of class and probability, the most likely first.
    """

    name: str
    label: str
    probability: float
    top: tuple[tuple[str, float], ...]


@dataclass(kw_only=True, repr=False)
class Predictions:
    """The answers to N inputs, as a sequence of `Prediction`.

    Attributes:
        names: names of the inputs.
        classes: the names of the C classes.
        logits: `[N, C]` in float32.
        unreadable: for each picture that was left out, the reason.
    """

    names: list[str]
    classes: list[str]
    logits: Tensor
    unreadable: dict[str, str]

    @property
    def probabilities(self) -> Tensor:
        """The softmax of the logits, `[N, C]`."""
        return self.logits.softmax(1)

    @property
    def labels(self) -> list[str]:
        """The most likely class of each input."""
        return [self.classes[i] for i in self.logits.argmax(1).tolist()]

    def top(self, count: int) -> list[tuple[tuple[str, float], ...]]:
        """Pairs of class and probability for each input, the most likely first."""
        best = self.probabilities.topk(min(count, len(self.classes)))
        return [
            tuple((self.classes[i], p) for i, p in zip(indices, values, strict=True))
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Prediction:
        i = range(len(self))[i]
        one = Predictions(
            names=[self.names[i]], classes=self.classes, logits=self.logits[i : i + 1],
            unreadable={},
        )  # fmt: skip
        return next(iter(one))

    def __iter__(self) -> Iterator[Prediction]:
        for name, top in zip(self.names, self.top(5), strict=True):
            yield Prediction(name=name, label=top[0][0], probability=top[0][1], top=top)

    def __repr__(self) -> str:
        few = [f"{printable(p.name)}: {p.label} {p.probability:.1%}" for p in self._first(10)]
        more = f"\n... and {len(self) - 10} more" if len(self) > 10 else ""
        return "\n".join(few) + more or "Predictions of no inputs"

    def _first(self, count: int) -> list[Prediction]:
        return [self[i] for i in range(min(count, len(self)))]

    def write_csv(self, path: str | Path) -> Path:
        """Write a table of the inputs, their classes and all probabilities, whole or not at all.

        It is UTF-8; in names of files that are not, odd bytes are written by their codes.
        """
        path = Path(path)
        odd = "backslashreplace"
        with (
            atomic_file(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors=odd) as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["input", "label", "probability", *self.classes])
            rows = zip(self.names, self.labels, self.probabilities.tolist(), strict=True)
            for name, label, values in rows:
                shown = [f"{value:.6g}" for value in values]
                writer.writerow([name, label, f"{max(values):.6g}", *shown])
        return path
