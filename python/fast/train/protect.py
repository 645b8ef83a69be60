"""What a run knows of the source task: the card that weights the pull, the forecast, the budget."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import nn

from fast.curvature.answers import SourceInputs
from fast.curvature.calibrate import Calibration
from fast.curvature.card import SourceCard
from fast.optim import SGD, AdamW
from fast.train.budget import (
    CHECK_SAMPLES,
    CHECK_SHARE,
    EXCESS,
    Budget,
    Controller,
    Forecast,
    Gauge,
    move_back,
    share_to_undo,
)
from fast.train.config import TrainConfig
from fast.train.data import TrainBatches
from fast.train.distill import Distillation
from fast.train.methods import METHODS
from fast.train.prepare import Drift

# A sample of a card costs two training samples: this keeps the card below 5 % of the run, with its
# calibration on 32 samples.
CARD_SHARE = 0.01
CARD_SAMPLES = (64, 512)
CALIBRATION_SAMPLES = 32
# At the end the budget is met by exact checks, each of which moves back once.
LAST_CHECKS = 4


def make_card(
    config: TrainConfig,
    model: nn.Module,
    card: SourceCard | str | Path | None,
    source_inputs: Any,
    batches: TrainBatches,
    steps: int,
) -> SourceCard | None:
    """The card of this run, bound to `model`, or None where nothing was given to make it of.

    Without source inputs `ewc` takes the target's, answered by the source head.

    Raises:
        ValueError: the card is of another model, or the inputs do not fit.
    """
    if card is not None:
        loaded = card if isinstance(card, SourceCard) else SourceCard.load(card)
        return _without_weights(loaded.bind(model))
    method = METHODS[config.method]
    if method.card_decay is None:
        return None
    data = source_inputs
    if data is None and config.method == "ewc":
        data = _target_inputs(batches)
    if data is None:
        return None
    low, high = CARD_SAMPLES
    count = min(max(int(CARD_SHARE * steps * config.batch_size), low), high)
    estimated = SourceCard.estimate(
        model,
        data,
        num_samples=count,
        calibration_samples=CALIBRATION_SAMPLES,
        seed=config.seed,
    )
    return _without_weights(estimated)


def _without_weights(card: SourceCard) -> SourceCard:
    """The optimizer keeps the pretrained weights of a run already."""
    return dataclasses.replace(card, _anchors={})


def _target_inputs(batches: TrainBatches) -> list[Any]:
    parts: list[Any] = []
    stream = batches.from_step(0)
    for _ in range(min(batches.steps_per_epoch, 1 + CARD_SAMPLES[1] // 16)):
        parts.append(next(stream)[0])
    return parts


def hold_back(source_inputs: Any, model: nn.Module, budget: Budget) -> Gauge:
    """The last of the source inputs, for checks; the card is made of the first.

    Raises:
        ValueError, TypeError: they are no inputs, or too few.
    """
    samples = SourceInputs(source_inputs, CARD_SAMPLES[1] + CHECK_SAMPLES)
    held = min(CHECK_SAMPLES, max(samples.size // 2, 2))
    part = samples.part(samples.size - held, samples.size)
    return Gauge(model, part.to(next(model.parameters()).device), budget.points)


class Protection:
    """Forecast and budget of one run.

    Args:
        gauge: exact checks, made before the head was replaced; or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        steps: int,
        stall: int,
        card: SourceCard | None,
        gauge: Gauge | None,
        optimizer: AdamW | SGD,
        drift: Drift,
        distillation: Distillation | None,
    ) -> None:
        self.card, self.gauge = card, gauge
        self.optimizer, self.drift = optimizer, drift
        self.steps, self.stall = steps, stall
        self.weighted = card is not None and METHODS[config.method].card_decay is not None
        # Without a card the energy is that of the drift, and the first check sets its scale.
        unknown = Calibration(math.nan, 1.0, math.inf, math.nan)
        self.forecast_of = Forecast(card.calibration if card is not None else unknown)
        self.controller: Controller | None = None
        self.interval = 0
        if config.forget_budget is None:
            return
        budget = Budget.parse(config.forget_budget)
        if gauge is None and (card is None or budget.points):
            raise ValueError(
                "forget_budget needs source_inputs to check on, or (for nats) a card to forecast by"
            )
        groups = [g for g in optimizer.param_groups if g["name"].startswith("backbone")]
        if not all(g["anchor_decay"] for g in groups):
            raise ValueError(
                f"forget_budget needs a pull to adjust: method {config.method!r} has none; use "
                "'fast', 'ewc' or 'l2-sp', or set anchor_decay"
            )
        self.controller = Controller(budget, groups, distillation)
        cost = CHECK_SAMPLES / (3 * config.batch_size * CHECK_SHARE)
        self.interval = max(1, min(math.ceil(cost), steps // 4))

    def energy(self) -> float:
        """`1/2 sum C (w - w0)^2` after the last step, from the update's own figures."""
        if self.card is not None and not self.weighted:
            return self.card.energy(self.drift.params, self.drift.anchors)
        figure = float(self.optimizer.stats()["forgetting"])
        if math.isnan(figure):  # stalled, or a pull of zero: the optimizer keeps no anchor
            figure = 0.5 * self.drift() ** 2 if not self.weighted else 0.0
        return figure * self.card.mean if self.weighted and self.card is not None else figure

    def forecast(self) -> float | None:
        """Forecast rise of the source loss (or loss of accuracy), None where nothing is known."""
        value = self.forecast_of(self.energy())
        return value if math.isfinite(value) else None

    def after_step(self, done: int, model: nn.Module) -> None:
        """Check and adjust, when it is time."""
        if self.controller is None or done <= self.stall:
            return
        if done == self.steps:
            self._settle(model)
        elif done % self.interval == 0:
            lost = self._check(model)
            if lost > EXCESS * self.controller.budget.amount:
                self._move_back(lost)
            self.controller.adjust(lost)

    def _check(self, model: nn.Module) -> float:
        energy = self.energy()
        if self.gauge is None:
            return self.forecast_of(energy)
        lost = self.gauge(model)
        self.forecast_of.update(energy, lost)
        return lost

    def _move_back(self, lost: float) -> None:
        assert self.controller is not None
        share = share_to_undo(lost / self.controller.aim, self.forecast_of.calibration.exponent)
        move_back(self.drift.params, self.drift.anchors, share)

    def _settle(self, model: nn.Module) -> None:
        """Meet the budget at the end, whatever the pull could not do in time."""
        assert self.controller is not None
        for _ in range(LAST_CHECKS if self.gauge is not None else 1):
            lost = self._check(model)
            if not lost > self.controller.budget.amount:
                return
            self._move_back(lost)

    def state(self) -> dict[str, Any]:
        factor = self.controller.factor if self.controller else 1.0
        return {"forecast": self.forecast_of.state(), "factor": factor}

    def load(self, state: dict[str, Any]) -> None:
        self.forecast_of.load(state["forecast"])
        if self.controller:
            self.controller.set(state["factor"])
