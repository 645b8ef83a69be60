"""The parts of the forgetting budget: what it counts, how it is forecast, steered and met."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.adapt.config import Budget
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
from fast.adapt.guards.forgetting import TEMPERATURE, ForgettingMeter, by_neighbours, hold_back
from fast.adapt.guards.weight_average import WeightAverage
from fast.adapt.guards.weight_line import WeightLine
from fast.adapt.network.drift import Drift
from fast.adapt.plan import plan_for
from fast.curvature.card.answers import divergence, expected_rise
from fast.curvature.card.calibrate import Calibration
from fast.data.source_inputs import SourceInputs
from fast.train.config import TrainConfig
from networks import ConvNet, images

X, Y = images(60, 5, seed=4)


@pytest.fixture
def networks():
    """One, and the same after a step; the second also answers another task by now."""
    torch.manual_seed(0)
    before = ConvNet().eval()
    now = copy.deepcopy(before)
    fast.replace_head(now, 3, sample=X[:2])
    with torch.no_grad():
        now.project.weight += 0.3 * torch.randn_like(now.project.weight)
    return before, now.eval()


def answers(networks):
    before, now = networks
    with torch.no_grad(), fast.source_task(now):
        return before(X), now(X)


@pytest.mark.parametrize(
    ("value", "amount", "points"),
    [(0.1, 0.1, False), ("0.25", 0.25, False), ("2%", 0.02, True), (" 0.5 % ", 0.005, True)],
)
def test_a_budget_is_nats_or_points(value, amount, points):
    assert Budget.parse(value) == Budget(amount=pytest.approx(amount), points=points)


def test_without_labels_the_meter_doubts_the_answers(networks):
    """Twice the divergence at temperature 2."""
    meter = ForgettingMeter(networks[0], SourceInputs.parse(X, 60), points=False)
    p, q = ((z.double() / 2).log_softmax(1) for z in answers(networks))
    assert meter(networks[1]) == pytest.approx(2 * (p.exp() * (p - q)).sum(1).mean().item())
    part = 2 * (p.exp() * (p - q)).sum(1)[:20].mean().item()
    assert meter(networks[1], 20) == pytest.approx(part)
    assert meter(networks[0]) == 0


def test_with_labels_it_is_the_rise_of_the_loss(networks):
    meter = ForgettingMeter(networks[0], SourceInputs.parse((X, Y), 60), points=False)
    z0, z = answers(networks)
    expected = F.cross_entropy(z, Y) - F.cross_entropy(z0, Y)
    assert meter(networks[1]) == pytest.approx(expected.item(), rel=1e-5)
    assert meter(networks[0]) == 0


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_doubt_matters_for_small_losses_only(size):
    """The answers are sure, and the margin of each is lost by `size`."""
    z0 = torch.zeros(4, 2)
    z0[:, 0] = 8.0
    z = z0.clone()
    z[:, 1] += size
    plain, doubted = divergence(z0, z).item(), expected_rise(z0, z).item()
    if size > 1:
        assert doubted == pytest.approx(plain, rel=0.05)
    else:
        assert doubted > 20 * plain


def test_points_are_the_accuracy_lost(networks):
    z0, z = answers(networks)
    labelled = ForgettingMeter(networks[0], SourceInputs.parse((X, Y), 60), points=True)
    right = [(a.argmax(1) == Y).double().mean().item() for a in (z0, z)]
    assert labelled(networks[1]) == pytest.approx(right[0] - right[1])
    bare = ForgettingMeter(networks[0], SourceInputs.parse(X, 60), points=True)
    p = z0.double().softmax(1)
    rows = range(60)
    expected = (p.amax(1) - p[rows, z.argmax(1)]).mean().item()
    assert expected > 0
    assert bare(networks[1]) == pytest.approx(expected)


def test_neighbours_leave_the_sample_itself_out():
    features = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
    labels = torch.tensor([0, 1, 1, 0])
    z = TEMPERATURE * by_neighbours(features, labels)
    # The first sample: its class but for itself is the fourth; the mean of the other class.
    assert z[0, 0].item() == pytest.approx(0.8)
    mean = F.normalize(torch.tensor([0.6, 1.8]), dim=0)
    assert z[0, 1].item() == pytest.approx(mean[0].item())
    alone = by_neighbours(features, None).softmax(1)
    assert alone.diagonal().max() == 0
    assert alone[0].argmax() == 3


@pytest.mark.parametrize("labels", [Y % 3, None])
def test_features_of_a_network_whose_head_does_not_count(networks, labels):
    """A head of noise: what is lost by neighbourhood does not depend on it."""
    before, now = networks
    data = X if labels is None else (X, labels)
    meter = ForgettingMeter(before, SourceInputs.parse(data, 60), points=False, skill="features")
    lost = meter(now)
    assert lost != 0
    with torch.no_grad():
        now.decide.source.weight.normal_()
        now.decide.linear.weight.normal_()
    assert meter(now) == pytest.approx(lost)


def test_labels_that_the_head_cannot_give(networks):
    for more, others in ((0, False), (1, True)):  # up to 4 and up to 5, of a head of 5 classes
        samples = SourceInputs.parse((X, Y + more), 60)
        assert ForgettingMeter(networks[0], samples, points=False).by_features == others
    samples = SourceInputs.parse((X, Y + 4), 60)
    with pytest.raises(ValueError, match=r"label 8, and the source head has 5 classes.*features"):
        ForgettingMeter(networks[0], samples, points=False, skill="answers")
    alone = SourceInputs.parse((X, torch.arange(60)), 60)
    with pytest.raises(ValueError, match="60 held-back samples of 60 classes"):
        ForgettingMeter(networks[0], alone, points=False)


class Tokens(nn.Module):
    """A head that sees each row of a picture by itself; its answers are averaged if `mean`."""

    def __init__(self, mean):
        super().__init__()
        self.body, self.fc, self.mean = nn.Linear(8, 6), nn.Linear(6, 5), mean

    def forward(self, x):
        logits = self.fc(self.body(x).flatten(0, 2))
        return logits.unflatten(0, x.shape[:3]).mean((1, 2)) if self.mean else logits


@pytest.mark.parametrize("data", [X, (X, Y)])
@pytest.mark.parametrize(
    ("mean", "skill", "message"),
    [
        (True, "features", "480 feature vectors of 60 samples.*set source_skill='answers'"),
        (False, "auto", r"answers 60 samples with 480 rows of logits.*return \[B, C"),
    ],
)
def test_each_sample_needs_one_answer(data, mean, skill, message):
    with pytest.raises(ValueError, match=message):
        ForgettingMeter(Tokens(mean), SourceInputs.parse(data, 60), points=False, skill=skill)


def test_answers_have_to_be_finite(networks):
    with torch.no_grad():
        networks[0].decide.bias[0] = math.inf
    with pytest.raises(ValueError, match="answers to them are not finite"):
        ForgettingMeter(networks[0], SourceInputs.parse(X, 60), points=False)


def test_a_label_that_the_head_cannot_give_counts_wherever_it_is(networks):
    """Also where it is not among the samples held back to measure on."""
    network = copy.deepcopy(networks[0])
    first, meter = hold_back(network, SourceInputs.parse((X, Y % 2), 60), budget=None, skill="auto")
    assert (first.size, meter.size) == (30, 30)
    assert not meter.by_features
    labels = Y % 2
    labels[0] = 7
    _, meter = hold_back(network, SourceInputs.parse((X, labels), 60), budget=None, skill="auto")
    assert int(meter.samples.labels.max()) < 5
    assert meter.by_features


@pytest.mark.parametrize(("budget", "held"), [(None, 128), (Budget(amount=0.1), 512)])
@pytest.mark.parametrize("samples", [60, 1200])
def test_a_budget_is_checked_on_more_inputs_but_at_most_on_half(networks, budget, held, samples):
    kept = SourceInputs.parse(X.repeat(samples // 60, 1, 1, 1), samples)
    first, meter = hold_back(networks[0], kept, budget=budget, skill="auto")
    assert meter.size == min(held, samples // 2)
    assert first.size == samples - meter.size


@pytest.mark.parametrize(("power", "looks"), [(1.0, 6), (2.0, 1), (6.0, 2)])
def test_a_line_lands_where_the_aim_is_lost(power, looks):
    """On a loss that is a power of the displacement, whatever power was guessed; two places around
    the aim tell the right one."""
    anchor, p = torch.zeros(5), nn.Parameter(torch.randn(5))
    end = p.detach().clone()
    line, measured = WeightLine([p], [anchor]), []

    def loss():
        measured.append(3 * float(p.detach().norm() / end.norm()) ** power)
        return measured[-1]

    lost = line.land(loss, lost=3.0, aim=0.4, exponent=2.0, checks=8)
    assert len(measured) == looks
    assert lost == measured[-1] == pytest.approx(0.4, rel=0.05)
    assert loss() == pytest.approx(lost)
    assert torch.allclose(p, line.place * end)


def test_the_last_place_is_guessed_from_the_nearest_measurement():
    """Each goes on from the one before by the power of 2 that is assumed; the loss has a power of
    1, so that more than the aim is lost at all of them."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])
    place = 1.0
    for _ in range(3):
        place *= (0.4 / (3 * place)) ** 0.5
    lost = line.land(lambda: 3 * p.item(), lost=3.0, aim=0.4, exponent=2.0, checks=2, surely=False)
    assert line.place == pytest.approx(place)
    assert lost == pytest.approx(3 * place)


def test_a_line_ends_at_the_last_place_that_was_measured_to_be_inside():
    """A cliff behind the first place that is measured, and before the second."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])
    lost = line.land(
        lambda: 9.0 if p.item() > 0.12 else 0.02, lost=9.0, aim=0.1, exponent=2.0, checks=2
    )
    assert lost == 0.02
    assert line.place == pytest.approx((0.1 / 9) ** 0.5)


def test_a_line_goes_far_back_where_all_is_lost_at_once():
    """A cliff at a twentieth of the way: the last check found nothing inside, a guess follows."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])
    lost = line.land(
        lambda: 9.0 if p.item() > 0.05 else 0.0, lost=9.0, aim=0.1, exponent=2.0, checks=4
    )
    assert lost <= 0.1
    assert p.item() < 0.05


@pytest.mark.parametrize("surely", [True, False])
def test_what_a_line_says_is_lost_was_measured(surely):
    """Everywhere but at the very start more is lost than the aim: no guess passes for the aim."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])

    def loss():
        return 9.0 if p.item() > 0 else 0.02

    lost = line.land(loss, lost=9.0, aim=0.1, exponent=2.0, checks=3, surely=surely)
    assert lost == loss() == (0.02 if surely else 9.0)


def test_landing_is_the_same_from_any_number_of_looks():
    start, end = torch.randn(50), torch.randn(50)
    p, q = nn.Parameter(end.clone()), nn.Parameter(end.clone())
    a, b = WeightLine([p], [start]), WeightLine([q], [start])
    for place in (0.3, 0.9, 0.1):
        a.go(place)
    a.go(0.5)
    b.go(0.5)
    assert torch.equal(p, q)


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


class Held:
    """A budget of 0.1 nats over one weight, of which `lost * weight ** 2` is lost."""

    size, by_features = 64, False

    def __init__(self, lost, average=False):
        self.lost, self.weight, self.factors = lost, nn.Parameter(torch.ones(1)), []
        self.average = WeightAverage([self.weight], horizon=10) if average else None
        self.budget = ForgettingBudget(
            model=nn.Linear(1, 1),
            plan=plan_for(TrainConfig(method="l2-sp", forget_budget=0.1), steps=100),
            batch_size=64,
            budget=Budget(amount=0.1),
            meter=self,
            card=None,
            weighted=False,
            stats=lambda: {"forgetting": torch.tensor(math.nan)},
            drift=Drift([self.weight], [torch.zeros(1)]),
            average=self.average,
            set_pull=self.factors.append,
        )
        self.step = min(self.budget.checks)

    def __call__(self, model, samples):
        return self.lost * self.weight.item() ** 2

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
