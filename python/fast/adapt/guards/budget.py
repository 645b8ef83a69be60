"""Keep what is forgotten inside a budget: the pull adjusts itself to what is measured.

Measured now and then by the truth, `fast.adapt.guards.forgetting`. Between two checks the forecast
follows the update's own telemetry.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast.adapt.config import Budget
from fast.adapt.shared_forward import FunctionPull
from fast.curvature.card.calibrate import EXPONENTS, Calibration
from fast.optim import SGD, AdamW

# The last search ends within a twentieth of what it aims at: inside the budget.
AIM, TOLERANCE = 0.95, 0.05
# The pull lets more than the aim be lost, and the last search takes what is over exactly. By
# `SETTLED` of the way a free run has lost about what it loses in the end; in between it loses up to
# half as much again, which a falling learning rate wins back: hence twice the aim, less at the end.
OVERSHOOT = 1.3
SETTLED, HEIGHT = 0.4, 0.7
# The pull gets stronger and weaker by at most these factors per check: it takes steps to act. What
# was let go too far is taken back at the next check, what was held too hard is lost to the target.
STRONGER, WEAKER = 4.0, 10.0
RANGE = (1e-4, 1e4)
# Two checks tell the exponent of the forecast where the energy grew by this factor between them.
APART = 1.3


@dataclass(frozen=True)
class Effort:
    """What checks may cost, and how many there are.

    Attributes:
        share: of the run's time; a forward pass is a third of a step.
        least, most: checks per run.
        samples: per check, at most, if the share allows.
    """

    share: float
    least: int
    most: int
    samples: int = 128

    def plan(self, held: int, steps: int, batch_size: int, whole: bool) -> tuple[int, int]:
        """(checks, samples of each).

        Args:
            held: samples there are.
            whole: a check needs them all.
        """
        allowed = _forwards(self.share, steps, batch_size)
        samples = held if whole else min(held, self.samples, max(32, allowed // self.least))
        return min(max(allowed // samples, self.least), self.most, steps), samples


def last_samples(held: int, steps: int, batch_size: int) -> int:
    """Samples of each of the checks that decide where the run ends."""
    allowed = _forwards(LAST_SHARE, steps, batch_size)
    return min(held, max(128, allowed // (1 + LAST_CHECKS)))


def _forwards(share: float, steps: int, batch_size: int) -> int:
    """Forward passes of samples that take this share of a run's time."""
    return int(share * 3 * batch_size * steps)


# A forecast alone must not show in the time of a step. A budget was asked for, and needs to see.
FORECAST = Effort(share=0.01, least=2, most=8)
BUDGET = Effort(share=0.03, least=8, most=16)
# Exact checks of the last search, along the segment to the pretrained weights, and their share.
LAST_CHECKS, LAST_SHARE = 5, 0.03


class Forecast:
    """From the energy of the displacement to what is counted, through the last checks.

    Args:
        calibration: of the card, or a plain proportion of unknown scale where there is none.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.checked: tuple[float, float] | None = None

    def __call__(self, energy: float) -> float:
        return self.calibration.nats(energy) if math.isfinite(energy) else math.nan

    def update(self, energy: float, measured: float) -> None:
        """Go through a new measurement from now on; one that shows no loss tells nothing."""
        if not (energy > 0 and measured > 0 and math.isfinite(measured)):
            return
        exponent = self.calibration.exponent
        if self.checked is not None:
            before, lost = self.checked
            if max(energy, before) > APART * min(energy, before):
                slope = math.log(measured / lost) / math.log(energy / before)
                exponent = min(max(slope, EXPONENTS[0]), EXPONENTS[1])
        self.checked = (energy, measured)
        self.calibration = self.calibration.through(energy, measured, exponent)

    def state(self) -> dict[str, Any]:
        c = self.calibration
        return {"scale": c.scale, "exponent": c.exponent, "checked": self.checked}

    def load(self, state: dict[str, Any]) -> None:
        c = self.calibration
        self.calibration = dataclasses.replace(c, scale=state["scale"], exponent=state["exponent"])
        self.checked = None if state["checked"] is None else tuple(state["checked"])


class Controller:
    """Turns what is lost, over what may be lost by now, into the strength of the pull.

    Args:
        budget: that the end of the run is aimed at, times `AIM`.
        optimizer: the `anchor_decay` of its backbone groups is adjusted,
        pull: and the weight of this, if there is one.
    """

    def __init__(
        self, budget: Budget, optimizer: AdamW | SGD, pull: FunctionPull | None = None
    ) -> None:
        self.budget, self.optimizer, self.pull = budget, optimizer, pull
        self.base = [group["anchor_decay"] for group in self._groups()]
        self.base_weight = pull.weight if pull else 0.0
        self.factor = 1.0

    def _groups(self) -> list[dict[str, Any]]:
        # Asked for each time: loading a state makes new ones.
        return [g for g in self.optimizer.param_groups if g["name"].startswith("backbone")]

    @property
    def aim(self) -> float:
        return AIM * self.budget.amount

    def due(self, done: float) -> float:
        """What may be lost when this share of the way is behind."""
        high = OVERSHOOT + HEIGHT * (1 - done)
        return high * self.aim * min(1.0, done / SETTLED)

    def adjust(self, lost: float, done: float) -> None:
        """Stronger when more is lost than was due by now, weaker when less.

        Args:
            lost: so far.
            done: share of the way that the learning rates have gone.
        """
        if not math.isfinite(lost):
            return
        change = max(lost, 0.0) / self.due(done)
        change = min(max(change, 1 / WEAKER), STRONGER)
        self.set(min(max(self.factor * change, RANGE[0]), RANGE[1]))

    def set(self, factor: float) -> None:
        self.factor = factor
        for group, base in zip(self._groups(), self.base, strict=True):
            group["anchor_decay"] = base * factor
        if self.pull:
            self.pull.weight = self.base_weight * factor


class Segment:
    """The way from the pretrained weights to those of now, and a place on it.

    The loss rises along it (Wortsman et al. 2022, arXiv 2109.01903), so any smaller loss can be
    chosen.

    Args:
        params: trained, and statistics that are tracked; they move.
        anchors: where they started.
    """

    def __init__(self, params: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
        self.params, self.anchors = params, anchors
        self.place = 1.0
        self._ends: list[Tensor] = []

    @torch.no_grad()
    def go(self, place: float) -> None:
        """Place the parameters at a share (0..1) of the way; exact whatever came before."""
        if not self._ends:
            self._ends = [p.detach().clone() for p in self.params]
        for p, a, end in zip(self.params, self.anchors, self._ends, strict=True):
            p.copy_(torch.lerp(a.to(p.dtype), end, place))
        self.place = place

    def land(
        self,
        measure: Callable[[], float],
        lost: float,
        aim: float,
        exponent: float,
        checks: int,
        tolerance: float = TOLERANCE,
        surely: bool = True,
    ) -> float:
        """Go where `aim` is lost, within a tolerance, or less.

        Args:
            lost: at the end of the way, where the parameters are, more than `aim`.
            exponent: a guess at how the loss grows with the place.
            surely: all the way back, where nothing else was found to be inside; else to a guess.

        Returns:
            what is lost there, as measured.
        """
        low, high = (0.0, 0.0), (1.0, lost)
        for _ in range(checks):
            if low[1] > 0:
                exponent = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
            place = high[0] * (aim / high[1]) ** (1 / max(exponent, 0.25))
            # Inside what is known, and not at its edge, where nothing would be learned.
            width = high[0] - low[0]
            place = min(max(place, low[0] + 0.1 * width), high[0] - 0.02 * width)
            self.go(place)
            lost = measure()
            if abs(lost - aim) <= tolerance * aim:
                return lost
            if lost > aim:
                high = (place, lost)
            else:
                low = (place, lost)
        if not lost > aim:
            return lost
        if low[0] > 0:  # the best that is known to be inside
            self.go(low[0])
            return low[1]
        self.go(high[0] * (aim / high[1]) ** (1 / max(exponent, 0.25)))
        lost = measure()
        if surely and lost > aim:
            self.go(0.0)
            lost = measure()
        return lost
