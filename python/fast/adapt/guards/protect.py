"""What a run knows of the source task: the card that weights the pull, the forecast, the budget."""

from __future__ import annotations

import dataclasses
import math
import warnings
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn

from fast.adapt.config import Budget, TrainConfig
from fast.adapt.guards.budget import (
    BUDGET,
    FORECAST,
    LAST_CHECKS,
    Controller,
    Forecast,
    Segment,
    last_samples,
)
from fast.adapt.guards.forgetting import Gauge
from fast.adapt.guards.weight_average import Average
from fast.adapt.job import Job
from fast.adapt.methods import METHODS, Plan, uses_card
from fast.adapt.prepare import Drift
from fast.adapt.schedule import lr_factor
from fast.adapt.shared_forward import FunctionPull
from fast.curvature.card import SourceCard
from fast.curvature.card.answers import SourceInputs
from fast.curvature.card.calibrate import Calibration
from fast.data.dataset import TrainBatches
from fast.data.source_inputs import known_inputs, target_inputs
from fast.heads import running_statistics
from fast.optim import SGD, AdamW

# A sample of a card costs two training samples, one of its calibration four: this keeps the card of
# a run of a hundred steps below 5 % of it (benchmarks/results/card_cost.md).
CARD_SHARE = 0.01
CARD_SAMPLES = (48, 512)
CALIBRATION_SAMPLES = 16
# Source inputs that are held back for checks: no more than half, and with a budget as many as make
# the loss of the end known within a fifth or so.
HELD_FOR_FORECAST, HELD_FOR_BUDGET = 128, 512
# Where a check finds more than this multiple of the budget lost, the weights are moved back at once
# to what was due by now; less is left to the pull, and to the search at the end.
EXCESS = 3.0


def bound_card(card: Any, model: nn.Module) -> SourceCard:
    """A card that was given, or its file, for this model.

    Raises:
        TypeError: something else; ValueError: the card is of another model.
    """
    if not isinstance(card, (SourceCard, str, Path)):
        raise TypeError(f"card must be a SourceCard or its file; got {type(card).__name__}")
    loaded = card if isinstance(card, SourceCard) else SourceCard.load(card)
    return _without_weights(loaded.bind(model))


def make_card(
    config: TrainConfig,
    model: nn.Module,
    card: SourceCard | None,
    source_inputs: Any,
    batches: TrainBatches,
    seen: int,
) -> SourceCard | None:
    """The card of this run, or None where nothing was given to make it of.

    Without source inputs `ewc` takes the target's, answered by the source head.

    Args:
        card: the one that was given, bound to `model`.
        seen: samples that the run trains on, one at each of its places.

    Raises:
        ValueError: the inputs do not fit.
    """
    if card is not None:
        return card
    if not uses_card(config, False, source_inputs is not None):
        return None
    low, high = CARD_SAMPLES
    data = target_inputs(batches, high) if source_inputs is None else source_inputs
    count = min(max(int(CARD_SHARE * seen), low), high)
    estimated = SourceCard.estimate(
        model,
        data,
        num_samples=count,
        calibration_samples=CALIBRATION_SAMPLES,
        coherence=False,
        seed=config.seed,
    )
    return _without_weights(estimated)


def _without_weights(card: SourceCard) -> SourceCard:
    """The optimizer keeps the pretrained weights of a run already."""
    return dataclasses.replace(card, _anchors={})


def hold_back(
    config: TrainConfig, model: nn.Module, source_inputs: Any
) -> tuple[SourceInputs | None, Gauge | None]:
    """The first source inputs, to work with, and the last, held back for checks.

    Args:
        model: at the pretrained weights, with its own head.
        source_inputs: None for none: then there is no gauge.

    Raises:
        ValueError, TypeError: what `known_inputs` and `Gauge` refuse.
    """
    if source_inputs is None:
        return None, None
    samples = known_inputs(model, source_inputs)
    budget = None if config.forget_budget is None else Budget.parse(config.forget_budget)
    wanted = HELD_FOR_FORECAST if budget is None else HELD_FOR_BUDGET
    first = samples.size - min(wanted, samples.size // 2)
    held = samples.part(first, samples.size).to(next(model.parameters()).device)
    points = budget is not None and budget.points
    top = None if samples.labels is None else int(samples.labels.max())
    return samples.part(0, first), Gauge(model, held, points, config.source_skill, top)


class Protection:
    """Forecast and budget of one run.

    Args:
        job: whose model has its new head, and still the pretrained weights and statistics.
        gauge: exact checks, made before the head was replaced; or None.
        average: what the run returns, where that is not its last weights. Checks look at it.
    """

    def __init__(
        self,
        job: Job,
        card: SourceCard | None,
        gauge: Gauge | None,
        optimizer: AdamW | SGD,
        drift: Drift,
        pull: FunctionPull | None,
        average: Average | None,
    ) -> None:
        config, plan, steps = job.config, job.plan, job.steps
        self.card, self.gauge = card, gauge
        self.optimizer, self.drift, self.average = optimizer, drift, average
        # Tracked batch norm forgets by its statistics too: they go back with the weights.
        tracked = config.batch_norm == "track" and config.forget_budget is not None
        self.statistics = running_statistics(job.model) if tracked else []
        self.first_statistics = [x.clone() for x in self.statistics]
        self.weighted = card is not None and METHODS[config.method].card_decay is not None
        # Without a card the energy is that of the drift, and the first check sets its scale.
        unknown = Calibration(scale=math.nan, exponent=1.0, spread=math.inf, coherence=math.nan)
        self.forecast_of = Forecast(card.calibration if card is not None else unknown)
        self.known: float | None = 0.0 if card is not None or gauge is not None else None
        self.controller: Controller | None = None
        self.paths = _paths(config, steps, plan)
        effort = FORECAST
        if config.forget_budget is not None:
            effort = BUDGET
            budget = Budget.parse(config.forget_budget)
            if gauge is None and (card is None or budget.points):
                raise ValueError(
                    "forget_budget needs source_inputs to check on, or (for nats) a card to "
                    "forecast by"
                )
            if not plan.anchor_decay:
                raise ValueError(
                    f"forget_budget needs a pull to adjust: method {config.method!r} has none; use "
                    "'fast', 'ewc' or 'l2-sp', or set anchor_decay"
                )
            self.controller = Controller(budget, optimizer, pull)
        held, whole = (gauge.size, gauge.by_features) if gauge is not None else (1, False)
        checks, self.samples = effort.plan(held, steps, job.batch_size, whole)
        self.last_samples = last_samples(held, steps, job.batch_size)
        # A forecast learns most early: the loss starts from zero and the first check sets the
        # scale. A budget is watched evenly.
        bend = 1.0 if self.controller else 2.0
        moving = steps - plan.stall
        self.checks = {
            plan.stall + math.ceil(moving * (k / checks) ** bend) for k in range(1, checks)
        }
        self.steps = steps

    def energy(self) -> float:
        """`1/2 sum C (w - w0)^2` after the last step, from the update's own figures."""
        if self.card is not None and not self.weighted:
            return self.card.energy(self.drift.params, self.drift.anchors)
        figure = float(self.optimizer.stats()["forgetting"])
        if math.isnan(figure):  # stalled, or a pull of zero: the optimizer keeps no anchor
            figure = 0.5 * self.drift() ** 2 if not self.weighted else 0.0
        return figure * self.card.mean if self.weighted and self.card is not None else figure

    def forecast(self) -> float | None:
        """Forecast rise of the source loss (or loss of accuracy), None where nothing is known.

        Right after a check it is what that has measured.
        """
        value = self.forecast_of(self.energy()) if self.known is None else self.known
        return value if math.isfinite(value) else None

    def after_step(self, done: int, model: nn.Module) -> None:
        """Check and adjust, when it is time.

        After the last step the weights are those that the run returns.
        """
        self.known = None
        if done == self.steps:
            self._finish(model)
        elif done in self.checks:
            with self.average.applied() if self.average else nullcontext():
                lost = self._check(model)
                place = 1.0
                if self.controller and lost > EXCESS * self.controller.budget.amount:
                    due = max(self.controller.aim, self.controller.due(self.paths[done - 1]))
                    place = self._land(model, lost, due, 1)
            if self.controller is None:
                return
            if place < 1 and self.average:
                Segment(self.drift.params, self.drift.anchors).go(place)
            self.controller.adjust(lost, self.paths[done - 1])

    def _check(self, model: nn.Module, samples: int | None = None) -> float:
        energy = self.energy()
        if self.gauge is None:
            return self.forecast_of(energy)
        lost = self.gauge(model, self.samples if samples is None else samples)
        self.forecast_of.update(energy, lost)
        self.known = lost
        return lost

    def _finish(self, model: nn.Module) -> None:
        """Meet the budget at the end, whatever the pull could not do in time."""
        if self.controller is None:
            if self.gauge is not None:
                self._check(model)
            return
        lost = self._check(model, self.last_samples)
        self._land(model, lost, self.controller.aim, LAST_CHECKS)
        if self.known is not None and self.known > self.controller.budget.amount:
            warnings.warn(
                f"forget_budget {self.controller.budget} is not met: {self.known:.3g} is lost even "
                "with the weights and batch norm statistics back at the pretrained ones, so the "
                "network answers otherwise for another reason: buffers of its own, or chance",
                stacklevel=2,
            )

    def _land(self, model: nn.Module, lost: float, aim: float, checks: int) -> float:
        """Go back along the segment to the pretrained weights, to where `aim` is lost.

        Returns:
            the share of the way that is left.
        """
        if not lost > aim:
            return 1.0
        exponent = 2 * self.forecast_of.calibration.exponent
        segment = Segment(
            [*self.drift.params, *self.statistics], [*self.drift.anchors, *self.first_statistics]
        )
        surely = checks > 1
        energy = self.energy()
        gauge = self.gauge
        if gauge is None:
            self.known = segment.land(
                lambda: self.forecast_of(energy * segment.place**2),
                lost,
                aim,
                exponent,
                checks,
                surely=surely,
            )
            return segment.place
        samples = self.last_samples if surely else self.samples
        self.known = segment.land(
            lambda: gauge(model, samples), lost, aim, exponent, checks, surely=surely
        )
        self.forecast_of.update(energy * segment.place**2, self.known)
        return segment.place

    def state(self) -> dict[str, Any]:
        factor = self.controller.factor if self.controller else 1.0
        return {"forecast": self.forecast_of.state(), "factor": factor}

    def load(self, state: dict[str, Any]) -> None:
        self.forecast_of.load(state["forecast"])
        if self.controller:
            self.controller.set(state["factor"])


def _paths(config: TrainConfig, steps: int, plan: Plan) -> list[float]:
    """Share of the sum of all learning rates of the backbone that is behind after each step."""
    rates = [0.0] * steps
    for step in range(plan.stall, steps):
        ramp = min(1.0, (step - plan.stall + 1) / plan.ramp) if plan.ramp else 1.0
        rates[step] = ramp * lr_factor(config.schedule, step, steps, config.warmup)
    total = sum(rates)
    return [x / total for x in accumulate(rates)] if total else [1.0] * steps
