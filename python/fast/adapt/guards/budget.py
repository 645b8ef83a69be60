"""Forecast what is forgotten, and keep it inside a budget.

Checks on held-back source inputs measure it now and then (`fast.adapt.guards.forgetting`); between
two checks the forecast follows figures that the optimizer reports. Under a budget, the pull is
adjusted at each check, and after the last step a search along the line to the pretrained weights
makes sure that the budget is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

from torch import nn

from fast.adapt.config import Budget
from fast.adapt.guards.base import Guard, Guards
from fast.adapt.guards.effort import BUDGET, FORECAST, LAST_CHECKS, last_samples
from fast.adapt.guards.forecast import UNKNOWN, Forecast
from fast.adapt.guards.weight_average import WeightAverage
from fast.adapt.guards.weight_line import WeightLine
from fast.adapt.optimizer import AdaptedOptimizer
from fast.adapt.plan import Plan
from fast.adapt.setup import Setup
from fast.adapt.source import Source
from fast.errors import warn
from fast.heads import running_statistics

# The last search aims at this share of the budget and ends within a twentieth of that: inside.
AIM = 0.95
# Mid-run about twice the aim may be lost: a run without a budget overshoots its final loss by half,
# and the falling learning rate wins that back. The source loss levels off after `SETTLED` of the
# way, so that
#     allowed(s) = AIM * budget * (OVERSHOOT + HEIGHT * (1 - s)) * min(1, s / SETTLED)
# at the share s of the way. The last search takes back what is over.
OVERSHOOT, HEIGHT, SETTLED = 1.3, 0.7, 0.4
# The pull gets stronger and weaker by at most these factors per check, because it takes steps to
# act. Letting go too far can be corrected at the next check; holding too hard costs the target
# steps that it never gets back.
STRONGER, WEAKER = 4.0, 10.0
RANGE = (1e-4, 1e4)
# Where a check measures more than this multiple of the budget, the weights move back at once to
# what is allowed by now. Smaller excesses are left to the pull and to the last search.
EXCESS = 3.0


class PullController:
    """Sets the strength of the pull by the ratio of what is lost to what may be lost by now.

    Args:
        budget: the run should end at this, times `AIM`.
        set_pull: takes the factor on the pull.
    """

    def __init__(self, budget: Budget, set_pull: Callable[[float], None]) -> None:
        self.budget, self._set_pull = budget, set_pull
        self.factor = 1.0

    @property
    def aim(self) -> float:
        return AIM * self.budget.amount

    def allowed(self, way: float) -> float:
        """What may be lost after the share `way` of the sum of the run's learning rates."""
        high = OVERSHOOT + HEIGHT * (1 - way)
        return high * self.aim * min(1.0, way / SETTLED)

    def adjust(self, lost: float, way: float) -> None:
        """Stronger when more is lost than was allowed by now, weaker when less."""
        if not math.isfinite(lost):
            return
        change = max(lost, 0.0) / self.allowed(way)
        change = min(max(change, 1 / WEAKER), STRONGER)
        self.set(min(max(self.factor * change, RANGE[0]), RANGE[1]))

    def set(self, factor: float) -> None:
        self.factor = factor
        self._set_pull(factor)


class ForgettingBudget(Guard):
    """Checks, forecast and budget of one run.

    Args:
        model: the network with its new head, still at the pretrained weights and statistics.
        setup: has the plan, and the budget: without one, forgetting is measured and forecast, but
            not limited. The first of its ranks decides for all.
        source: has what measures forgetting exactly, and the source card, or neither.
        optimizer: pulls the backbone back, and tells how far it has moved.
        guards: all that hold the source beside that pull.
        average: the averaged weights, if the run returns these; checks then measure them.
    """

    def __init__(
        self,
        model: nn.Module,
        setup: Setup,
        source: Source,
        *,
        optimizer: AdaptedOptimizer,
        guards: Guards,
        average: WeightAverage | None,
    ) -> None:
        plan, budget, meter, card = setup.plan, setup.config.budget, source.meter, source.card
        self._ranks = setup.ranks
        self.model, self.meter, self.card, self.average = model, meter, card, average
        self.drift, self._optimizer, self._guards = optimizer.drift, optimizer, guards
        self.forecaster = Forecast(card.calibration if card is not None else UNKNOWN)
        # The result of the last check, valid until the next step.
        self.measured: float | None = 0.0 if card is not None or meter is not None else None
        self.controller: PullController | None = None
        if budget is not None:
            self.controller = PullController(budget, self._set_pull)
        # Tracked batch norm forgets through its statistics too, so they go back with the weights.
        tracked = plan.batch_norm == "track" and budget is not None
        self._statistics = running_statistics(model) if tracked else []
        self._first_statistics = [x.clone() for x in self._statistics]
        size = meter.size if meter is not None else 1
        self.checks, self._samples = (BUDGET if budget else FORECAST).schedule(
            samples=size,
            whole=meter is not None and meter.by_features,
            steps=plan.steps,
            stall=plan.stall,
            batch_size=setup.batch_size,
        )
        self._last_samples = last_samples(size, plan.steps, setup.batch_size)
        self._way = _shares_of_the_way(plan)
        self._steps = plan.steps

    def _set_pull(self, factor: float) -> None:
        """Multiply everything that holds the source: the optimizer's pull, and the penalties."""
        self._optimizer.set_pull(factor)
        self._guards.set_strength(factor)

    def energy(self) -> float:
        """`1/2 sum C (w - w0)^2` after the last step, from the update's own figures."""
        weighted = self._optimizer.weighted
        if self.card is not None and not weighted:
            return self.card.energy(self.drift.params, self.drift.anchors)
        figure = float(self._optimizer.stats()["forgetting"])
        if math.isnan(figure):  # in a stall, or without a pull, the optimizer has no anchor
            figure = 0.5 * self.drift() ** 2 if not weighted else 0.0
        return figure if self.card is None else figure * self.card.mean

    def forecast(self) -> float | None:
        """Forecast rise of the source loss (or loss of accuracy); None where nothing is known.

        Right after a check it is what the check measured.
        """
        value = self.forecaster(self.energy()) if self.measured is None else self.measured
        return value if math.isfinite(value) else None

    def after_step(self, step: int) -> None:
        """Check and adjust, if a check is due."""
        self.measured = None
        if step >= self._steps or step not in self.checks:
            return
        way = self._way[step - 1]
        place = 1.0
        with self.average.applied() if self.average else nullcontext():
            lost = self._check(self._samples)
            if self.controller and lost > EXCESS * self.controller.budget.amount:
                due = max(self.controller.aim, self.controller.allowed(way))
                place = self._land(lost, due, last=False)
        if self.controller is None:
            return
        if place < 1 and self.average:
            WeightLine(self.drift.params, self.drift.anchors).go(place)
        self.controller.adjust(lost, way)

    def finish(self) -> None:
        """Meet the budget exactly, where the pull has not; the weights are then final."""
        if self.controller is None:
            if self.meter is not None:
                self._check(self._samples)
            return
        lost = self._check(self._last_samples)
        self._land(lost, self.controller.aim, last=True)
        if self.measured is not None and self.measured > self.controller.budget.amount:
            warn(
                f"forget_budget {self.controller.budget} is not met: {self.measured:.3g} is lost "
                "even with the weights and batch norm statistics back at the pretrained ones, so "
                "the network answers otherwise for another reason: buffers of its own, or chance",
            )

    def _agreed(self, figure: float) -> float:
        # All ranks have the same weights, but they may round differently.
        return float(self._ranks.from_first(figure))

    def _check(self, samples: int) -> float:
        energy = self._agreed(self.energy())
        if self.meter is None:
            return self.forecaster(energy)
        lost = self._agreed(self.meter(self.model, samples))
        self.forecaster.update(energy, lost)
        self.measured = lost
        return lost

    def _land(self, lost: float, aim: float, *, last: bool) -> float:
        """Go back along the line to the pretrained weights, to the point where `aim` is lost.

        Args:
            last: the run ends there, so that the search takes its time and ends inside.

        Returns:
            that point, as a share of the distance to the present weights (1: they stay).
        """
        if not lost > aim:
            return 1.0
        line = WeightLine(
            [*self.drift.params, *self._statistics], [*self.drift.anchors, *self._first_statistics]
        )
        energy, meter = self._agreed(self.energy()), self.meter
        samples = self._last_samples if last else self._samples

        def measure() -> float:
            if meter is None:
                return self.forecaster(energy * line.place**2)
            return self._agreed(meter(self.model, samples))

        self.measured = line.land(
            measure,
            lost=lost,
            aim=aim,
            exponent=2 * self.forecaster.calibration.exponent,
            checks=LAST_CHECKS if last else 1,
            surely=last,
        )
        if meter is not None:
            self.forecaster.update(energy * line.place**2, self.measured)
        return line.place

    def state_dict(self) -> dict[str, Any]:
        factor = self.controller.factor if self.controller else 1.0
        return {
            "forecast": self.forecaster.state_dict(),
            "factor": factor,
            "measured": self.measured,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forecaster.load_state_dict(state["forecast"])
        self.measured = state["measured"]
        if self.controller:
            self.controller.set(float(state["factor"]))


def _shares_of_the_way(plan: Plan) -> list[float]:
    """After each step, the share of the sum of the backbone's learning rates so far."""
    rates = [plan.ramp_factor(step) * plan.lr_factor(step) for step in range(plan.steps)]
    total = sum(rates)
    return [x / total for x in accumulate(rates)] if total else [1.0] * plan.steps
