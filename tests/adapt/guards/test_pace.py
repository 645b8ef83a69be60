"""The first step of the backbone tells how much it bears, with weights and with adapters."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn

import fast
from fast.adapt.guards.pace import FARTHEST, FARTHEST_WITH_LAYER_NORMS, Pace
from networks import ConvNet, images

TRAIN, SOURCE = images(64, 4), images(48, 5, seed=3)[0]
WEIGHTS = {"source_inputs": SOURCE}
ADAPTERS = {"method": "adapter"}
UNLIMITED = {"weights": math.inf, "adapters": math.inf}
KINDS = pytest.mark.parametrize("kind", [WEIGHTS, ADAPTERS], ids=["weights", "adapters"])


@pytest.fixture
def pretrained():
    torch.manual_seed(0)
    return ConvNet(num_classes=5)


def adapt(pretrained, **options):
    torch.manual_seed(0)  # adapters start at random
    adaptation = fast.Adaptation(copy.deepcopy(pretrained), TRAIN, steps=5, **options)
    (guard,) = (g for g in adaptation.guards if isinstance(g, Pace))
    return adaptation, guard


def step(adaptation):
    inputs, labels, rows = next(adaptation.batches())
    logits, penalty = adaptation.forward(inputs, rows)
    (nn.functional.cross_entropy(logits, labels) + penalty).backward()
    adaptation.optimizer.step()
    adaptation.optimizer.zero_grad()


def after_one_step(pretrained, **options):
    """The adaptation, its first weights, and the guard, after a step of the backbone."""
    adaptation, guard = adapt(pretrained, **options)
    start = [p.detach().clone() for p in adaptation.params]
    step(adaptation)
    return adaptation, start, guard


@KINDS
def test_a_first_step_that_goes_too_far_is_taken_back_in_part(pretrained, monkeypatch, kind):
    options = {"lr": 0.5, "ramp": 0, **kind}
    slowed, start, guard = after_one_step(pretrained, **options)
    assert 0 < guard.pace < 0.5
    monkeypatch.setattr("fast.adapt.guards.pace.FARTHEST", UNLIMITED)
    plain, _, unslowed = after_one_step(pretrained, **options)
    assert unslowed.pace == 1
    rates = [a.optimizer.param_groups[0]["restraint"] for a in (slowed, plain)]
    assert rates[0] == pytest.approx(guard.pace * rates[1])
    for before, p, whole in zip(start, slowed.params, plain.params, strict=True):
        torch.testing.assert_close(p - before, guard.pace * (whole - before))


@KINDS
def test_it_does_not_depend_on_the_ramp(pretrained, kind):
    """A ramp shortens the first step, and what a whole one would do counts."""
    lr = 0.2 if kind is WEIGHTS else 0.3
    whole, ramped = (after_one_step(pretrained, lr=lr, ramp=r, **kind)[2].pace for r in (0, 4))
    assert whole < 1
    assert ramped == pytest.approx(whole, rel=0.5)


@KINDS
@pytest.mark.parametrize("rates", [[0.1], [0.0, 0.1]], ids=["small", "zero, then small"])
def test_it_does_not_depend_on_a_warmup_of_the_loop(pretrained, kind, rates):
    """The first step that moves the backbone counts, and what it would do at the full rate."""
    options = {"lr": 0.2 if kind is WEIGHTS else 0.3, "ramp": 0, **kind}
    whole = after_one_step(pretrained, **options)[2].pace
    adaptation, guard = adapt(pretrained, **options)
    schedule = [
        [group["lr"] * rate for group in adaptation.optimizer.param_groups] for rate in rates
    ]
    for lrs in schedule:
        assert guard.pace is None
        for group, lr in zip(adaptation.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        step(adaptation)
    assert whole < 1
    # Adam's second step is shorter than its first, where the gradients differ.
    assert whole / 2 < guard.pace < 2 * whole


def test_a_step_that_a_scaler_skips_does_not_count(pretrained):
    adaptation, guard = adapt(pretrained, lr=0.5, ramp=0, **WEIGHTS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (torch.inf, 1.0):
        assert guard.pace is None
        inputs, labels, rows = next(adaptation.batches())
        logits, penalty = adaptation.forward(inputs, rows)
        loss = factor * (nn.functional.cross_entropy(logits, labels) + penalty)
        scaler.scale(loss).backward()
        scaler.step(adaptation.optimizer), scaler.update(), adaptation.optimizer.zero_grad()
    assert 0 < guard.pace < 0.5


def test_a_stall_tells_no_pace(pretrained):
    """The head moves in it, and the backbone's rate is 0."""
    adaptation, guard = adapt(pretrained, lr=0.5, ramp=0, head_steps=0, stall=2, **WEIGHTS)
    for _ in range(2):
        step(adaptation)
        assert guard.pace is None
    step(adaptation)
    assert 0 < guard.pace < 1


@KINDS
def test_a_step_that_a_network_bears_stays_as_it_is(pretrained, kind):
    adaptation, _, guard = after_one_step(pretrained, lr=1e-3, **kind)
    assert guard.pace == 1
    step(adaptation)
    assert guard.pace == 1


@pytest.mark.parametrize("distance", [math.inf, math.nan])
def test_features_that_are_not_finite_tell_no_pace(pretrained, monkeypatch, distance):
    monkeypatch.setattr("fast.adapt.guards.pace.distances", lambda *_: torch.tensor([distance]))
    adaptation, start, guard = after_one_step(pretrained, lr=0.5, ramp=0, **WEIGHTS)
    assert guard.pace == 1
    assert any(not torch.equal(p, b) for p, b in zip(adaptation.params, start, strict=True))


@KINDS
def test_later_steps_are_not_taken_back(pretrained, kind):
    adaptation, _, guard = after_one_step(pretrained, lr=0.5, ramp=0, **kind)
    pace, before = guard.pace, [p.detach().clone() for p in adaptation.params]
    step(adaptation)
    assert guard.pace == pace
    assert any(not torch.equal(p, b) for p, b in zip(adaptation.params, before, strict=True))


@KINDS
def test_it_is_saved(pretrained, kind):
    options = {"lr": 0.5, "ramp": 0, **kind}
    adaptation, _, guard = after_one_step(pretrained, **options)
    other, loaded = adapt(pretrained, **options)
    other.load_state_dict(adaptation.state_dict())
    assert loaded.pace == guard.pace < 1
    assert other.optimizer.param_groups[0]["restraint"] == pytest.approx(
        adaptation.optimizer.param_groups[0]["restraint"]
    )


def test_layer_norms_bear_less(pretrained):
    """The same network, beside a layer norm that does nothing to it."""
    options = {"lr": 0.5, "ramp": 0, **WEIGHTS}
    plain = after_one_step(pretrained, **options)[2]
    normed = copy.deepcopy(pretrained)
    normed.unused = nn.LayerNorm(4)
    held = after_one_step(normed, **options)[2]
    assert held.pace == pytest.approx(
        plain.pace * FARTHEST_WITH_LAYER_NORMS["weights"] / FARTHEST["weights"]
    )


def test_it_is_told(pretrained, caplog):
    caplog.set_level(logging.INFO, "fast")
    after_one_step(pretrained, lr=0.5, ramp=0, **ADAPTERS)
    assert "the rate is multiplied by" in caplog.text


def test_adapters_answer_the_source_as_before(pretrained):
    """Only adapters, norms and the head are measured and taken back."""
    pretrained.eval()
    before = pretrained(SOURCE)
    adaptation, _, _ = after_one_step(pretrained, lr=0.5, ramp=0, **ADAPTERS)
    adaptation.model.eval()
    with torch.no_grad(), fast.source_task(adaptation.model):
        torch.testing.assert_close(adaptation.model(SOURCE), before)


def test_the_rounding_of_autocast_is_not_taken_for_a_move(pretrained):
    """At the small rate of a warm-up it would have been far more than the step itself."""
    adaptation, guard = adapt(pretrained, lr=1e-3, autocast_dtype=torch.bfloat16, **WEIGHTS)
    for group in adaptation.optimizer.param_groups:
        group["lr"] *= 1e-3
    step(adaptation)
    assert guard.pace == 1
