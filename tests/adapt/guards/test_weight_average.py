"""The weight average: what it is of, and when it is shown."""

from __future__ import annotations

import copy

import pytest
import torch

import fast
from fast.adapt.guards.weight_average import WeightAverage
from fast.heads import task_head
from networks import ConvNet, images

TRAIN, VAL = images(300, 4, seed=1), images(100, 4, seed=2)
KNOWN, ASKED = images(300, 5, seed=3), images(200, 5, seed=4)
RUN = {"steps": 60, "lr": 1e-2, "eval_every": 60}


def test_the_average_of_the_first_steps_is_their_mean():
    weights = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([weights], horizon=100)
    for step in range(1, 11):
        with torch.no_grad():
            weights.fill_(float(step))
        average.after_step(step)
    # Every other step: 2, 4, ..., 10.
    assert torch.allclose(average.values[0], torch.full((3,), 6.0))
    with average.applied():
        assert torch.allclose(weights, torch.full((3,), 6.0))
    assert torch.equal(weights, torch.full((3,), 10.0))


def test_after_one_step_the_average_is_that_of_one_step():
    weights = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([weights], horizon=100)
    with torch.no_grad():
        weights.fill_(1.0)
    average.after_step(1)
    assert torch.equal(average.values[0], weights)


@pytest.mark.parametrize(("horizon", "expected"), [(1, 3.0), (2, 2.25)])
def test_an_average_over_one_or_two_steps_leaves_none_out(horizon, expected):
    weights = torch.nn.Parameter(torch.zeros(()))
    average = WeightAverage([weights], horizon=horizon)
    for step in range(1, 4):
        with torch.no_grad():
            weights.fill_(float(step))
        average.after_step(step)
    assert float(average.values[0]) == expected  # of 2, with halves: ((1 + 2) / 2 + 3) / 2


@pytest.mark.parametrize("steps", [5, 6])
def test_the_average_of_a_run_that_ends_in_its_stall_has_the_head_that_was_learned(steps):
    model = ConvNet()
    options = {"head_steps": 0, "stall": 5, "ramp": 0, "average": 4, "lr": 1e-2}
    result = fast.finetune(model, TRAIN, VAL, steps=steps, eval_every=1, **options)
    assert task_head(model).linear.weight.abs().sum() > 0
    assert result.history[3]["target_loss"] < result.history[0]["target_loss"]


def test_what_is_evaluated_in_the_middle_is_the_average():
    torch.manual_seed(0)
    model = ConvNet()
    options = {"steps": 40, "lr": 1e-2, "eval_every": 20, "schedule": "constant", "val": VAL}
    averaged = fast.finetune(copy.deepcopy(model), TRAIN, **options)
    plain = fast.finetune(copy.deepcopy(model), TRAIN, average=0, **options)
    # The same steps are taken; only what is shown of them differs.
    assert averaged.history[1]["loss"] == plain.history[1]["loss"]
    assert averaged.history[1]["target_loss"] != plain.history[1]["target_loss"]
    differ = [
        not torch.equal(a, b)
        for a, b in zip(averaged.model.parameters(), plain.model.parameters(), strict=True)
    ]
    assert any(differ)
