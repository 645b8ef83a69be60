"""The protocol of guards: what each of them may do for the source task in a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast.errors import some, warn


@dataclass(frozen=True, kw_only=True)
class SourceBatch:
    """Source inputs that run beside a target batch.

    Attributes:
        inputs: `[S, ...]`, in any form that the network takes.
        reference: what each of them should give, `[S, ...]`: features at the pretrained weights, or
            answers.
        total: divisor of a sum over the samples: the number of source samples in the step, averaged
            over the ranks.
    """

    inputs: Any
    reference: Tensor
    total: float


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A part of a step's batch, or all of it.

    Attributes:
        inputs: target inputs, `[B, ...]`.
        places: index of each target sample's remembered source answer, `[B]` on the CPU; -1 where
            none is remembered.
        remembered: how many samples of the whole step have a place, averaged over the ranks.
        source: source inputs that run beside the target inputs, or None.
        part, parts: number of the micro-batch, and how many the step has.
    """

    inputs: Any
    places: Tensor
    remembered: float
    source: SourceBatch | None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a forward pass showed of a micro-batch.

    Attributes:
        model: the network, unwrapped.
        step: number of the step, from 0.
        batch: the micro-batch.
        inputs: its target inputs, on the model's device.
        features: the head's input for them, `[B, D]` or `[B, T, D]`; None where no guard needs it.
        source_features: the head's input for the source inputs, or None.
    """

    model: nn.Module
    step: int
    batch: MicroBatch
    inputs: Any
    features: Tensor | None
    source_features: Tensor | None


class Guard:
    """Something that holds the source task while the target is learned; every method is optional.

    Attributes:
        strength: factor on the penalty; a forgetting budget sets it.
        in_loss: whether the loss that a run reports includes the penalty.
    """

    strength: float = 1.0
    in_loss: bool = True

    def source_batch(self, step: int) -> SourceBatch | None:
        """Source inputs to run beside the target batch of this step."""
        return None

    def penalty(self, seen: Seen) -> Tensor | None:
        """What to add to the loss, `[]`, before `strength`; the micro-batches of a step add up."""
        return None

    def lr_factor(self) -> float:
        """Factor on the learning rate, at most 1."""
        return 1.0

    def before_step(self, step: int, rate: float) -> None:
        """Called before every optimizer step.

        Args:
            step: how many are done.
            rate: the backbone's learning rate in this step, before its ramp, as a share of the
                plan's.
        """

    def after_step(self, step: int) -> None:
        """Called after every optimizer step, `step` of them done."""

    def finish(self) -> None:
        """Called once, after the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `load_state_dict` goes on from."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; its tensors are copied into the existing ones."""


class Guards(list[Guard]):
    """The guards of an adaptation, all together.

    Attributes:
        strength: factor on the penalties, set by `set_strength`.
        penalised: whether one of those that `watch` saw was differentiated; None if it saw none.
    """

    strength = 1.0
    penalised: bool | None = None

    def watch(self, penalty: Tensor) -> None:
        """Notice whether the loop adds the penalty to its loss."""
        if penalty.requires_grad:
            self.penalised = bool(self.penalised)
            penalty.register_hook(lambda _: setattr(self, "penalised", True))

    def set_strength(self, factor: float) -> None:
        self.strength = factor
        for guard in self:
            guard.strength = factor

    def penalties(self, seen: Seen, device: torch.device) -> tuple[Tensor, Tensor]:
        """The penalty that the reported loss includes, and the one that it does not, each `[]`."""
        inside, outside = torch.zeros((), device=device), torch.zeros((), device=device)
        for guard in self:
            penalty = guard.penalty(seen)
            if penalty is not None and guard.in_loss:
                inside = inside + penalty
            elif penalty is not None:
                outside = outside + penalty
        return self.strength * inside, outside

    def lr_factor(self) -> float:
        return math.prod(guard.lr_factor() for guard in self)

    def before_step(self, step: int, rate: float) -> None:
        for guard in self:
            guard.before_step(step, rate)

    def after_step(self, step: int) -> None:
        for guard in self:
            guard.after_step(step)

    def finish(self) -> None:
        for guard in self:
            guard.finish()

    def state_dict(self) -> dict[str, Any]:
        # The names of the classes are part of the format of a state.
        return {type(guard).__name__: guard.state_dict() for guard in self}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for guard in self:
            guard.load_state_dict(state[type(guard).__name__])

    def warn_unseen(self, why: str) -> None:
        """Warn that a loop passes by what guards do in `forward`.

        Args:
            why: what the first step was.
        """
        blind = [type(g).__name__ for g in self if type(g).penalty is not Guard.penalty]
        if blind:
            warn(
                f"the first step was {why}, so that nothing of the source is held by "
                f"{some(blind)}: let forward() run the network, and add its penalty to the loss"
            )
