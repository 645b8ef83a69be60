"""What a step multiplies the learning rate of a group by: stall, ramp and restraint."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fast
from fast.optim import AdamW
from optim.small_networks import flat, network, parameter, train

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


def test_a_group_that_is_added_later_counts_its_own_steps():
    p, q = parameter(1.0), parameter(1.0)
    optimizer = fast.SGD([p], lr=0.1, stall=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    p.grad = torch.ones(1)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    optimizer.add_param_group({"params": [q], "stall": 3})
    groups = optimizer.state_dict()["param_groups"]  # which counts a step that is still open
    assert [group["progress"] for group in groups] == [1, 0]


def test_stall_skips_completely_and_ramp_rises():
    p, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [p], "stall": 2, "ramp": 4}, {"params": [head]}], lr=0.1, eps=0.0)
    moved = []
    for _ in range(8):
        before = p.detach().clone()
        p.grad, head.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        moved.append((before - p).mean().item())
    assert moved == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert optimizer.state[p]["step"] == 6
    assert optimizer.state[head]["step"] == 8


def test_stall_survives_a_checkpoint():
    runs = []
    for interrupted in (False, True):
        p = nn.Parameter(torch.ones(3))
        make = lambda p=p: AdamW([p], lr=0.1, stall=2, ramp=4)  # noqa: E731
        optimizer = make()
        for i in range(6):
            if interrupted and i == 3:
                state = optimizer.state_dict()
                assert type(state["param_groups"][0]["progress"]) is int
                optimizer = make()
                optimizer.load_state_dict(state)
            p.grad = torch.ones(3)
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


def scaled_steps(device, overflows):
    """[(progress, how far the weight moved)] of a run with `stall` 2, `ramp` 2."""
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = AdamW([p], lr=0.1, eps=0.0, stall=2, ramp=2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    seen = []
    for overflow in overflows:
        before = p.detach().clone()
        optimizer.zero_grad()
        loss = scaler.scale(p.sum())
        (loss * float("inf") if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        progress = optimizer.state_dict()["param_groups"][0]["progress"]
        seen.append((progress, round((before - p).mean().item(), 5)))
    return seen


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_overflows_use_up_neither_stall_nor_ramp(device):
    clean = [(1, 0.0), (2, 0.0), (3, 0.05), (4, 0.1)]
    assert scaled_steps(device, [False] * 4) == clean
    seen = scaled_steps(device, [True, True, False, True, False, True, False, True, False])
    assert [row for i, row in enumerate(seen) if i in (2, 4, 6, 8)] == clean
    assert [seen[i] for i in (0, 1, 3, 5, 7)] == [(0, 0), (0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_itself():
    """With GradScaler and in the ramp: a step waits for the one before it at most."""
    p = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = AdamW([p], lr=0.1, ramp=100)
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.grad_scale = torch.ones((), device="cuda")
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of work queued before the step
    queued = torch.cuda.Event()
    queued.record()
    optimizer.step()
    assert not queued.query()
    assert optimizer.state_dict()["param_groups"][0]["progress"] == 3
    assert queued.query()
