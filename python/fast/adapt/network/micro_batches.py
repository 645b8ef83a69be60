"""Split a step's batch into micro-batches, with the source inputs and answers that go with them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast.adapt.guards.base import Guard, MicroBatch, SourceBatch
from fast.adapt.guards.distill import Distillation
from fast.data.trees import length, pick
from fast.ranks import Ranks


class MicroBatches:
    """Makes the micro-batches of a step, whose penalties add up to the step's.

    Args:
        guards: any of them may supply source inputs that run beside the target's.
        ranks: processes that share a step.
    """

    def __init__(self, guards: Sequence[Guard], ranks: Ranks) -> None:
        self._guards, self._ranks = guards, ranks
        self._distillation = next((g for g in guards if isinstance(g, Distillation)), None)

    def part(
        self, inputs: Any, rows: Tensor | None, *, step: int, part: int, parts: int
    ) -> MicroBatch:
        """The given inputs as one of `parts` micro-batches of a step, which are taken to be alike.

        Args:
            inputs, rows: see `Adaptation.forward`.

        Raises:
            ValueError: these are no row numbers of the inputs.
        """
        if rows is not None:
            rows = _checked(rows, inputs)
            if self._distillation is not None:
                self._distillation.check(rows, inputs)
        places = self._places(inputs, rows)
        return MicroBatch(
            inputs=inputs,
            places=places,
            remembered=parts * self._remembered(places),
            source=shares(self._source(step), parts)[part],
            part=part,
            parts=parts,
        )

    def split(self, inputs: Any, rows: Tensor | None, *, step: int, size: int) -> list[MicroBatch]:
        """The inputs of a whole step in micro-batches of `size`."""
        places = self._places(inputs, rows)
        remembered = self._remembered(places)
        slices = [slice(i, i + size) for i in range(0, length(inputs), size)]
        sources = shares(self._source(step), len(slices))
        return [
            MicroBatch(
                inputs=pick(inputs, part),
                places=places[part],
                remembered=remembered,
                source=source,
                part=i,
                parts=len(slices),
            )
            for i, (part, source) in enumerate(zip(slices, sources, strict=True))
        ]

    def _places(self, inputs: Any, rows: Tensor | None) -> Tensor:
        if self._distillation is None:
            return torch.full((length(inputs),), -1)
        return self._distillation.places(rows, inputs)

    def _remembered(self, places: Tensor) -> float:
        number = int((places >= 0).sum())
        if self._distillation is None or self._ranks.size == 1:
            return number
        return self._ranks.total(number) / self._ranks.size

    def _source(self, step: int) -> SourceBatch | None:
        batches = (guard.source_batch(step) for guard in self._guards)
        return next((batch for batch in batches if batch is not None), None)


def shares(source: SourceBatch | None, parts: int) -> list[SourceBatch | None]:
    """The source samples of a step for each of its micro-batches; None where there are none."""
    if source is None:
        return [None] * parts
    n = len(source.reference)
    bounds = [n * i // parts for i in range(parts + 1)]
    return [
        SourceBatch(
            inputs=pick(source.inputs, slice(a, b)),
            reference=source.reference[a:b],
            total=source.total,
        )
        if b > a
        else None
        for a, b in itertools.pairwise(bounds)
    ]


def _checked(rows: Any, inputs: Any) -> Tensor:
    rows = torch.as_tensor(rows)
    whole = not rows.is_floating_point() and rows.dtype != torch.bool
    if not whole or rows.shape != (length(inputs),):
        raise ValueError(
            f"rows must be the numbers of these {length(inputs)} inputs in the training data, "
            f"int64 [{length(inputs)}]; got {str(rows.dtype).removeprefix('torch.')} "
            f"{list(rows.shape)}. Leave rows out where they are not known"
        )
    return rows
