"""The parts of the forgetting budget: how it is forecast, steered and met."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fast.adapt.config import Budget
from fast.adapt.guards.base import Guards
from fast.adapt.guards.budget import (
    AIM,
    OVERSHOOT,
    SETTLED,
    STRONGER,
    WEAKER,
    ForgettingBudget,
    PullController,
)
from fast.adapt.guards.effort import BUDGET, FORECAST, LAST_CHECKS, last_samples
from fast.adapt.guards.forecast import Forecast
from fast.adapt.guards.weight_average import WeightAverage
from fast.adapt.network.drift import Drift
from fast.adapt.plan import plan_for
from fast.curvature.card.calibrate import Calibration
from fast.ranks import ALONE
from fast.train.config import TrainConfig


@pytest.mark.parametrize(
    ("value", "amount", "points"),
    [(0.1, 0.1, False), ("0.25", 0.25, False), ("2%", 0.02, True), (" 0.5 % ", 0.005, True)],
)
def test_a_budget_is_nats_or_points(value, amount, points):
    assert Budget.parse(value) == Budget(amount=pytest.approx(amount), points=points)


def test_the_forecast_goes_through_what_was_measured():
    forecast = Forecast(Calibration(scale=2.0, exponent=1.0, spread=1.0, coherence=1.0))
    assert forecast(0.5) == 1.0
    forecast.update(0.5, 0.1)
    assert forecast(0.5) == pytest.approx(0.1)
    assert forecast(1.0) == pytest.approx(0.2)
    forecast.update(1.0, 0.1 * 2**1.5)  # steeper than it said
    assert forecast(2.0) == pytest.approx(0.1 * 4**1.5)
    for energy, measured in [(1.0, -0.1), (1.0, 0.0), (0.0, 1.0), (1.0, math.nan)]:  # no news
        forecast.update(energy, measured)
        assert forecast(2.0) == pytest.approx(0.1 * 4**1.5)
    again = Forecast(Calibration(scale=5.0, exponent=0.7, spread=1.0, coherence=1.0))
    again.load_state_dict(forecast.state_dict())
    assert again(3.0) == forecast(3.0)
    for each in (forecast, again):  # the last measurement is part of the state
        each.update(3.0, 1.0)
    assert again(4.0) == forecast(4.0)
    near = Forecast(Calibration(scale=2.0, exponent=1.0, spread=1.0, coherence=1.0))
    near.update(1.0, 0.1)
    near.update(1.2, 0.4)  # too near to tell how steep it is
    assert near(2.4) == pytest.approx(0.8)
    untouched = Forecast(Calibration(scale=2.0, exponent=1.0, spread=1.0, coherence=1.0))
    again.load_state_dict(untouched.state_dict())
    assert again(0.5) == 1.0


def test_the_pull_follows_what_is_lost():
    factors = []
    controller = PullController(Budget(amount=0.1), factors.append)
    allowed = controller.allowed
    assert allowed(1.0) == pytest.approx(OVERSHOOT * AIM * 0.1)
    assert allowed(SETTLED) > allowed(0.5) > allowed(1.0)
    assert allowed(0.1) < allowed(0.2) < allowed(SETTLED)
    for lost, way, expected in [
        (allowed(0.2), 0.2, 1.0),
        (2 * allowed(0.5), 0.5, 2.0),
        (1e3, 0.7, 2.0 * STRONGER),
        (-0.1, 0.8, 2.0 * STRONGER / WEAKER),
    ]:
        controller.adjust(lost, way)
        assert factors[-1] == pytest.approx(expected)
    controller.adjust(math.nan, 0.9)  # no news
    assert len(factors) == 4
    for _ in range(50):
        controller.adjust(0.0, 1.0)
    assert 0 < factors[-1] < 1e-3


@pytest.mark.parametrize(("steps", "held"), [(4, 128), (150, 512), (20_000, 512)])
def test_checks_cost_no_more_than_their_share(steps, held):
    """Each needs a few samples at least, so in a very short run a few checks cost more."""
    times, samples = BUDGET.schedule(samples=held, whole=False, steps=steps, stall=0, batch_size=64)
    checks = len(times) + 1
    assert 1 <= checks <= min(16, steps)
    assert samples <= held
    assert all(0 < time < steps for time in times)
    if steps > 100:
        assert checks * samples / 3 <= 0.03 * 64 * steps
        assert (1 + LAST_CHECKS) * last_samples(held, steps, 64) / 3 <= 0.03 * 64 * steps


def test_a_long_run_is_checked_often_and_only_once_the_backbone_moves():
    options = {"samples": 512, "whole": False, "steps": 20_000, "batch_size": 64}
    for effort in (BUDGET, FORECAST):
        times, samples = effort.schedule(stall=5000, **options)
        assert (len(times), samples) == (effort.most - 1, effort.samples)
        assert min(times) > 5000
        assert max(times) < 20_000
    assert last_samples(512, 20_000, 64) == 512
    assert last_samples(10**6, 1000, 64) == 0.03 * 3 * 64 * 1000 / 6  # five checks, and one before
    assert last_samples(10**6, 10, 64) == 128


def setup_of(*, method, **facts):
    """A run of 100 steps whose budget is 0.1 nats."""
    config = TrainConfig(method=method, forget_budget=0.1)
    plan = plan_for(config, steps=100, **facts)
    return SimpleNamespace(config=config, plan=plan, batch_size=64, ranks=ALONE)


class Held:
    """A budget of 0.1 nats over one weight, of which `lost * weight ** power` is lost."""

    size, by_features = 64, False

    def __init__(self, lost, average=False, power=2):
        self.lost, self.weight, self.factors = lost, nn.Parameter(torch.ones(1)), []
        self.power = power
        self.average = WeightAverage([self.weight], horizon=10) if average else None
        self.budget = ForgettingBudget(
            nn.Linear(1, 1),
            setup_of(method="l2-sp"),
            SimpleNamespace(meter=self, card=None),
            optimizer=SimpleNamespace(
                weighted=False,
                stats=lambda: {"forgetting": torch.tensor(math.nan)},
                drift=Drift([self.weight], [torch.zeros(1)]),
                set_pull=self.factors.append,
            ),
            guards=Guards(),
            average=self.average,
        )
        self.step = min(self.budget.checks)

    def __call__(self, model, samples):
        return self.lost * self.weight.item() ** self.power

    @property
    def allowed(self):
        """What may be lost at the first check."""
        return self.budget.controller.allowed(self.budget._way[self.step - 1])


@pytest.mark.parametrize("average", [False, True])
def test_a_large_excess_is_taken_back_at_once(average):
    held = Held(lost=0.4, average=average)
    held.budget.after_step(held.step)
    assert held(None, 64) == pytest.approx(max(held.allowed, AIM * 0.1), rel=0.05)
    assert held.budget.measured == pytest.approx(held(None, 64))
    assert held.factors == [pytest.approx(min(STRONGER, 0.4 / held.allowed))]
    if average:
        assert torch.equal(held.average.values[0], held.weight)


def test_what_was_taken_back_is_forecast_from():
    held = Held(lost=0.4, power=4)
    held.budget.after_step(held.step)
    taken_back, held.budget.measured = held.budget.measured, None
    assert taken_back < 0.4
    assert held.budget.forecast() == pytest.approx(taken_back)


def test_a_card_alone_keeps_a_budget():
    """Its curvature weights the pull with a mean of 1, and is three times that in the mean."""
    weight = nn.Parameter(torch.ones(1))
    calibration = Calibration(scale=2.0, exponent=1.0, spread=1.0, coherence=1.0)
    budget = ForgettingBudget(
        nn.Linear(1, 1),
        setup_of(method="ewc", weighted=True),
        SimpleNamespace(meter=None, card=SimpleNamespace(calibration=calibration, mean=3.0)),
        optimizer=SimpleNamespace(
            weighted=True,
            stats=lambda: {"forgetting": weight.detach().square().sum() / 2},
            drift=Drift([weight], [torch.zeros(1)]),
        ),
        guards=Guards(),
        average=None,
    )
    assert budget.energy() == 1.5
    budget.finish()
    assert budget.forecast() == pytest.approx(AIM * 0.1, rel=0.05)
    assert 2 * 1.5 * weight.item() ** 2 == pytest.approx(budget.forecast())


def test_a_smaller_excess_is_left_to_the_pull():
    held = Held(lost=0.29)
    held.budget.after_step(held.step)
    assert held.weight.item() == 1
    assert held.budget.measured == pytest.approx(0.29)
    assert held.factors == [pytest.approx(min(STRONGER, 0.29 / held.allowed))]


def test_between_checks_nothing_is_measured():
    held = Held(lost=0.4)
    for step in {held.step - 1, held.step + 1, 100} - held.budget.checks:
        held.budget.after_step(step)
    assert (held.budget.measured, held.factors, held.weight.item()) == (None, [], 1)


@pytest.mark.parametrize(("lost", "ends"), [(0.09, 0.09), (0.4, 0.095), (50.0, 0.095)])
def test_a_run_ends_inside_its_budget_and_near_it(lost, ends):
    held = Held(lost)
    held.budget.finish()
    assert held.budget.measured == held(None, 64) == pytest.approx(ends, rel=0.05)
    assert held.budget.forecast() == held.budget.measured
    held.budget.measured = None
    assert held.budget.forecast() == pytest.approx(ends, rel=0.05)  # by how far the weights are


def test_forecast_and_pull_go_on_from_a_state():
    held, other = Held(lost=0.29), Held(lost=9.0)
    held.budget.after_step(held.step)
    other.budget.load_state_dict(held.budget.state_dict())
    assert other.factors == held.factors
    assert other.budget.forecast() == held.budget.forecast() == pytest.approx(0.29)
    other.budget.measured = None
    assert other.budget.forecast() == pytest.approx(0.29)  # of the same drift
    with torch.no_grad():
        other.weight.fill_(2.0)
    assert other.budget.forecast() == pytest.approx(4 * 0.29)
