"""Measure how much a network bears by its very first step, and go on at that pace.

Adam's first step is as long as its rate, whatever the gradient. A step at the full rate would move
the features of one network by a third of a standard deviation, and those of another by sixteen: at
that rate the second one loses them before any average tells. So a few inputs are run before and
after the first step of the backbone, in the same precision. If it went too far, a part of it is
taken back, and the learning rate of the whole run falls by as much.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fast import dtensor
from fast.adapt.guards.base import Guard
from fast.adapt.guards.rehearse import distances
from fast.data.trees import length
from fast.heads import by_sample, evaluating, features_of, has_layer_norm
from fast.ranks import ALONE, Ranks

log = logging.getLogger("fast")

MEASURED = 16  # samples that tell it
# How far a step at the full rate may move the features, in their standard deviations. At the rates
# of `fast.adapt.defaults` one of weights would move those of ResNets by 0.3, of MiniLM by 1, of
# MobileNets by 3 to 6, and of a ViT-S/14 by 10 to 16, which such a rate ruined. One of adapters
# would move those of MiniLM by 0.3, of ResNets by 1, of the ViT by 2.6, of MobileNets by 4 to 5;
# from all flowers a MobileNet learned 81.6 % at a limit of 3, and 89.0 at 2.
FARTHEST = {"weights": 3.0, "adapters": 2.0}
# In a network with layer norms: at a limit of 3, 1.7 and 1 a ViT-S/14 learned waste to 76.6, 75.2
# and 72.8 %, and lost 17.6, 10.2 and no points of its source. MobileNets, which have no norms, lost
# no more at 3 than at 1, and learned 0.6 points more. Adapters of the ViT were ruined at 1.4, and
# learned flowers to 85 % at 1.2 and to 89 at 0.8.
FARTHEST_WITH_LAYER_NORMS = {"weights": 1.0, "adapters": 0.8}


def farthest(model: nn.Module, what: Literal["weights", "adapters"]) -> float:
    """The limit for a network in which weights or adapters learn."""
    return (FARTHEST_WITH_LAYER_NORMS if has_layer_norm(model) else FARTHEST)[what]


class Pace(Guard):
    """Shortens the first step of the backbone, and all that follow, where it went too far.

    Args:
        model: the network before its first step.
        head: the module whose input the features are.
        inputs: a few inputs, `[N, ...]`, on the model's device.
        scale: one over the variance of features, `[]`.
        task: the context in which the network computes these features.
        ramp: the part of the learning rate that the ramp leaves of a step, by the step's number.
        farthest: how far a step at the full rate may move features, in standard deviations.
        ranks: processes that train together; the first one reports.

    Attributes:
        pace: factor on the learning rate, at most 1; None before the backbone has moved.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        head: nn.Module,
        inputs: Any,
        scale: Tensor,
        task: Callable[[nn.Module], AbstractContextManager[Any]],
        ramp: Callable[[int], float],
        farthest: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self.pace: float | None = None
        self._model, self._head, self._task = model, head, task
        self._inputs, self._scale = inputs, scale
        self._ramp, self._farthest, self._ranks = ramp, farthest, ranks
        self._rate = 0.0  # of the step, as a share of the full rate
        # Parameters and features, as they were before the step.
        self._start: list[tuple[Tensor, Tensor]] = []
        self._before: Tensor | None = None

    def lr_factor(self) -> float:
        return 1.0 if self.pace is None else self.pace

    def before_step(self, step: int, rate: float) -> None:
        self._rate = rate * self._ramp(step)
        if self.pace is None and self._rate:
            parameters = (p for p in self._model.parameters() if p.requires_grad)
            self._start = [(p, p.detach().clone()) for p in parameters]
            self._before = self._features()

    @torch.no_grad()
    def _features(self) -> Tensor:
        with evaluating(self._model), self._task(self._model):
            now = features_of(self._model, self._head, self._inputs)
        return by_sample(now, length(self._inputs)).to(self._scale.dtype)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        start, before, self._start, self._before = self._start, self._before, [], None
        # A step that a GradScaler skips moves nothing.
        if before is None or not dtensor.norm(p.detach() - was for p, was in start):
            return
        e = distances(self._features(), before, self._scale).mean().item()
        farthest = math.sqrt(e) / self._rate
        self.pace = 1.0
        if not self._farthest < farthest < math.inf:
            return
        self.pace = self._farthest / farthest
        for p, was in start:
            p.lerp_(was, 1 - self.pace)
        if self._ranks.first:
            log.info(
                "a step at the full learning rate would move the features by %.1f of their "
                "standard deviations: the rate is multiplied by %.2f",
                farthest,
                self.pace,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"pace": self.pace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pace = None if state["pace"] is None else float(state["pace"])
