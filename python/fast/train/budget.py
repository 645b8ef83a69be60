"""Keep what is forgotten inside a budget: the pull adjusts itself to the forecast.

Checked now and then by the truth: the source answers to held-back source inputs, against those of
the pretrained network. Between two checks the forecast follows the update's own telemetry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.curvature.answers import SourceInputs, divergence, source_answers
from fast.curvature.calibrate import Calibration
from fast.train.config import Budget
from fast.train.distill import Distillation

# Held-back source inputs are often training images of the network, which it forgets last: on
# CIFAR-10 networks the loss of test images rose by 1.0 to 1.4 times what was measured on them.
AIM = 0.8
# Share of the run's time that checks may take; a forward pass is a third of a step.
CHECK_SHARE = 0.05
CHECK_SAMPLES = 128
# The pull changes by at most this factor per check: it takes steps to act.
MAX_CHANGE = 4.0
RANGE = (1e-4, 1e4)
# Beyond this multiple of the budget waiting for the pull is too slow: move back at once.
EXCESS = 1.5


class Gauge:
    """The exact quantity that a budget limits, on some source inputs.

    With labels: the rise of their cross-entropy, or the accuracy lost. Without: the divergence of
    the answers from those of the pretrained network, or the share of answers that changed.

    Args:
        model: at the pretrained weights.
        samples: on its device.
    """

    def __init__(self, model: nn.Module, samples: SourceInputs, points: bool) -> None:
        self.samples, self.points = samples, points
        self.answers = source_answers(model, samples)

    def __call__(self, model: nn.Module) -> float:
        now, before, y = source_answers(model, self.samples), self.answers, self.samples.labels
        if self.points:
            right = before.argmax(1) if y is None else y
            return float(_accuracy(before, right) - _accuracy(now, right))
        if y is None:
            return float(divergence(before, now))
        return float(F.cross_entropy(now, y) - F.cross_entropy(before, y))


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).double().mean()


class Forecast:
    """From the energy of the displacement to what the budget counts, through the last check.

    Args:
        calibration: of the card, or a plain proportion where there is none.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.checked: tuple[float, float] | None = None

    def __call__(self, energy: float) -> float:
        return self.calibration.nats(energy) if math.isfinite(energy) else math.nan

    def update(self, energy: float, measured: float) -> None:
        """Go through a new measurement from now on; one that shows no loss tells nothing."""
        self.checked = (energy, measured)
        self.calibration = self.calibration.through(energy, measured)

    def state(self) -> dict[str, Any]:
        return {"scale": self.calibration.scale, "checked": self.checked}

    def load(self, state: dict[str, Any]) -> None:
        self.calibration = Calibration(
            state["scale"],
            self.calibration.exponent,
            self.calibration.spread,
            self.calibration.coherence,
            self.calibration.points,
        )
        self.checked = None if state["checked"] is None else tuple(state["checked"])


class Controller:
    """Turns forecast over budget into the strength of the pull.

    At rest the pull balances the gradient, so the displacement goes as 1 / pull and its energy as
    1 / pull^2: the pull is multiplied by the square root of the excess.

    Args:
        budget: that the forecast is held at, times `AIM`.
        groups: the optimizer's backbone groups; their `anchor_decay` is adjusted,
        distillation: and the weight of this, if there is one.
    """

    def __init__(
        self,
        budget: Budget,
        groups: Sequence[dict[str, Any]],
        distillation: Distillation | None = None,
    ) -> None:
        self.budget, self.groups, self.distillation = budget, list(groups), distillation
        self.base = [group["anchor_decay"] for group in groups]
        self.base_weight = distillation.weight if distillation else 0.0
        self.factor = 1.0

    @property
    def aim(self) -> float:
        return AIM * self.budget.amount

    def adjust(self, forecast: float) -> None:
        """Stronger when more than the aim is forecast to be lost, weaker when less."""
        if not math.isfinite(forecast):
            return
        change = math.sqrt(max(forecast, 0.0) / self.aim)
        change = min(max(change, 1 / MAX_CHANGE), MAX_CHANGE)
        self.set(min(max(self.factor * change, RANGE[0]), RANGE[1]))

    def set(self, factor: float) -> None:
        self.factor = factor
        for group, base in zip(self.groups, self.base, strict=True):
            group["anchor_decay"] = base * factor
        if self.distillation:
            self.distillation.weight = self.base_weight * factor


@torch.no_grad()
def move_back(params: Sequence[Tensor], anchors: Sequence[Tensor], share: float) -> None:
    """Undo a share (0..1) of the displacement of `params` from `anchors`."""
    for p, a in zip(params, anchors, strict=True):
        p.lerp_(a.to(p.dtype), share)


def share_to_undo(excess: float, exponent: float) -> float:
    """How much of the displacement makes the loss `excess` times too large.

    The loss goes as energy^exponent, the energy as the square of the displacement.
    """
    return 1 - excess ** (-0.5 / exponent)
