"""The group key `restraint`: a factor of the learning rate beside a scheduler's and the ramp's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fast
from optim.test_against_torch import flat, network, train

OPTIMIZERS = {
    "adamw": (fast.AdamW, torch.optim.AdamW, {}),
    "sgd": (fast.SGD, torch.optim.SGD, {"momentum": 0.9}),
}
both = pytest.mark.parametrize(("ours", "theirs", "keys"), OPTIMIZERS.values(), ids=OPTIMIZERS)


@both
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_it_multiplies_the_learning_rate(ours, theirs, keys, tensor_lr):
    weights = []
    for lr, restraint in ((0.02, 0.25), (0.005, 1.0), (0.02, 1.0)):
        model = network()
        rate = torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr
        pull = {"anchor_decay": 3.0, "weight_decay": 0.1, "ramp": 3}
        optimizer = ours(model.parameters(), lr=rate, **pull, **keys)
        optimizer.param_groups[0]["restraint"] = restraint
        train(optimizer, model, 6)
        assert optimizer.param_groups[0]["lr"] == lr, "lr is the scheduler's"
        weights.append(flat(model))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)
    assert (weights[0] - weights[2]).abs().max() > 1e-4


def test_it_belongs_to_a_group():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    fast.SGD([{"params": [a], "restraint": 0.5}, {"params": [b]}], lr=0.1).step()
    torch.testing.assert_close(a.detach(), torch.full((2,), -0.05))
    torch.testing.assert_close(b.detach(), torch.full((2,), -0.1))


@both
def test_it_is_saved_and_loaded(ours, theirs, keys):
    optimizer = ours(network().parameters(), **keys)
    optimizer.param_groups[0]["restraint"] = 0.25
    for state in (optimizer.state_dict(), copy.deepcopy(optimizer).state_dict()):
        other = ours(network().parameters(), **keys)
        other.load_state_dict(state)
        assert other.param_groups[0]["restraint"] == 0.25


@both
def test_a_state_without_it_restrains_nothing(ours, theirs, keys):
    """A state of torch's optimizer, and one that was saved before the key was there."""
    model = network()
    other = theirs(model.parameters(), **keys)
    train(other, model, 1)
    earlier = copy.deepcopy(ours(network().parameters(), **keys).state_dict())
    del earlier["param_groups"][0]["restraint"]
    for state in (other.state_dict(), earlier):
        optimizer = ours(network().parameters(), **keys)
        optimizer.param_groups[0]["restraint"] = 0.25
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["restraint"] == 1.0


@both
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, None, "x", torch.ones(2)])
def test_a_bad_value_is_named_and_nothing_is_updated(ours, theirs, keys, value):
    for lr in (0.1, torch.tensor(0.1)):
        a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        a.grad, b.grad = torch.ones(2), torch.ones(2)
        with pytest.raises(ValueError, match="restraint must"):
            ours([{"params": [a], "restraint": value}])
        optimizer = ours([{"params": [a]}, {"params": [b]}], lr=lr, **keys)
        optimizer.param_groups[1]["restraint"] = value
        with pytest.raises(ValueError, match="restraint must"):
            optimizer.step()
        assert not a.any()


@both
def test_a_compiled_step_follows_it(ours, theirs, keys):
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        model = network()
        optimizer = ours(model.parameters(), lr=0.01, anchor_decay=0.5, **keys)
        step = optimizer.step
        if compiled:
            counter = CompileCounter()
            step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
        for i in range(8):
            optimizer.param_groups[0]["restraint"] = 1 / (i + 2)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            step()
        weights.append(flat(model))
    assert torch.equal(*weights)
    # The first step, steps with state, and with a factor that has changed.
    assert counter.frame_count <= 3
