"""The pull in function space: stay with what the network computed before the first step.

The pull of the optimizer holds the weights; this holds what they do, on target inputs (the source
head's answers, `fast.adapt.guards.distill`) and on source inputs (features,
`fast.adapt.guards.rehearse`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.guards.distill import Distillation
from fast.adapt.guards.rehearse import HeadInput, Rehearsal
from fast.data.trees import join, length, move, pick
from fast.heads import TaskHead, by_sample, evaluating, forward_logits


class FunctionPull:
    """Both penalties of a run, at no forward pass of their own.

    Args:
        head: of the model that is trained; its input is watched from now on.
        distillation, rehearsal: or None.

    Attributes:
        weight: factor on both, for a controller to turn.
    """

    def __init__(
        self, head: TaskHead, distillation: Distillation | None, rehearsal: Rehearsal | None
    ) -> None:
        self.distillation, self.rehearsal = distillation, rehearsal
        self.weight = 1.0
        self._seen = HeadInput(head)

    def stream(self, step: int) -> Iterator[Any]:
        """Source inputs and their features at w0, step by step; or None for ever."""
        if self.rehearsal is None:
            while True:
                yield None
        yield from self.rehearsal.from_step(step)

    def places(self, index: Tensor | None, inputs: Any) -> Tensor:
        """What distillation knows of each target sample of a batch, `[B]`; -1: nothing.

        Args:
            index: rows of the training data, or None.
            inputs: of the batch, as the network will see them.
        """
        if self.distillation is None:
            return torch.full((length(inputs),), -1)
        return self.distillation.places(index, inputs)

    def forward(
        self,
        model: nn.Module,
        inputs: Any,
        places: Tensor,
        known: int,
        source: tuple[Any, Tensor, int] | None,
    ) -> tuple[Tensor, Tensor]:
        """Run a micro-batch.

        Args:
            inputs: of the target, on the model's device.
            places: of its samples.
            known: samples of the whole batch that distillation knows.
            source: source inputs, their features at w0, and how many the whole batch has; or None.

        Returns:
            target logits, and this part's share of the penalty, `[]`.
        """
        device = next(model.parameters()).device
        sources = move(source[0], device) if source is not None else None
        apart = self.rehearsal is not None and self.rehearsal.apart
        logits, features, source_features = self._seen.forward(model, inputs, sources, apart)
        penalty = torch.zeros((), device=device)
        if self.distillation and known:
            penalty = penalty + self.distillation.penalty(features, places, inputs) / known
        if self.rehearsal and source is not None and source_features is not None:
            source_features = by_sample(source_features, len(source[1]))
            part = self.rehearsal.penalty(source[1], source_features)
            penalty = penalty + part / source[2]
        return logits, self.weight * penalty

    @property
    def restraint(self) -> float:
        """Factor on the learning rate that the rehearsal asks for."""
        return self.rehearsal.restraint if self.rehearsal else 1.0

    def after_step(self) -> None:
        if self.rehearsal:
            self.rehearsal.after_step(self.weight)

    def state(self) -> dict[str, float]:
        return self.rehearsal.state() if self.rehearsal else {}

    def load(self, state: dict[str, float]) -> None:
        if self.rehearsal:
            self.rehearsal.load(state)

    def close(self) -> None:
        """Stop watching the head."""
        self._seen.close()


def shares(source: tuple[Any, Tensor] | None, parts: int) -> list[tuple[Any, Tensor, int] | None]:
    """Source samples of a step for each of its micro-batches; None where there are none."""
    if source is None:
        return [None] * parts
    inputs, features = source
    n = len(features)
    bounds = [n * i // parts for i in range(parts + 1)]
    return [
        (pick(inputs, slice(a, b)), features[a:b], n) if b > a else None
        for a, b in itertools.pairwise(bounds)
    ]


@torch.no_grad()
def cuts_at_head(model: nn.Module, head: TaskHead, target: Any, source: Any) -> bool:
    """Whether target and source inputs can run together up to the head, and only the target beyond.

    Not where what follows the head counts the samples for itself, by its inputs.

    Args:
        target, source: batches of inputs, on the model's device; a few of the first are used.
    """
    few = pick(target, slice(4))
    both = join(few, source)
    if both is None:
        return True
    seen = HeadInput(head)
    try:
        with evaluating(model):
            alone = forward_logits(model, few)
            return seen.cut(model, both, length(few)).shape == alone.shape
    except (IndexError, RuntimeError, ValueError):
        return False
    finally:
        seen.close()
