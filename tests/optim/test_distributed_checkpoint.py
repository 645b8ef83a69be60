"""torch.distributed.checkpoint of one process: saved, and loaded into a fresh optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import fast

CASES = {
    "adamw with anchors": (fast.AdamW, {"anchor_decay": 5.0}, {}),
    "sgd with anchors": (fast.SGD, {"anchor_decay": 5.0}, {"momentum": 0.9}),
    "in the stall": (fast.AdamW, {"stall": 3}, {}),
    "in the stall, with anchors": (fast.AdamW, {"stall": 3, "anchor_decay": 5.0}, {}),
    "with a frozen weight": (fast.AdamW, {"anchor_decay": 5.0}, {}),
}


def fresh(cls: Any, keys: dict[str, Any], options: dict[str, Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    groups = fast.param_groups(model, lr=0.01, **keys)
    return model, cls(groups, **options)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


# Both are torch's own; the second comes from old versions such as 2.6.
@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage")
@pytest.mark.parametrize("case", CASES)
def test_goes_on_as_if_it_had_never_stopped(case, tmp_path):
    cls, keys, options = CASES[case]
    model, optimizer = fresh(cls, keys, options)
    if case == "with a frozen weight":
        model[0].weight.requires_grad_(False)
    train(model, optimizer, 2)
    names = ("model", "optimizer")
    states = dict(zip(names, get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=tmp_path)
    train(model, optimizer, 3)

    again, other = fresh(cls, keys, options)
    if case == "with a frozen weight":
        again[0].weight.requires_grad_(False)
    states = dict(zip(names, get_state_dict(again, other), strict=True))
    dcp.load(states, checkpoint_id=tmp_path)
    set_state_dict(
        again, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    assert [g["progress"] for g in other.param_groups] == [2, 2]
    train(again, other, 3)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage")
def test_a_dampened_momentum_is_not_lost_in_silence(tmp_path):
    """A state that never stepped has none, so that torch's SGD begins one undamped."""
    options = {"momentum": 0.9, "dampening": 0.5}
    model, optimizer = fresh(fast.SGD, {"anchor_decay": 5.0}, options)
    train(model, optimizer, 2)
    dcp.save({"optimizer": get_state_dict(model, optimizer)[1]}, checkpoint_id=tmp_path)
    train(model, optimizer, 3)

    again, other = fresh(fast.SGD, {"anchor_decay": 5.0}, options)

    def load():
        loaded = {"optimizer": get_state_dict(again, other)[1]}
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_optimizer_state_dict(again, other, loaded["optimizer"])

    with pytest.raises(ValueError, match="set the dampening of the groups to 0"):
        load()
    for group in other.param_groups:
        group["dampening"] = 0
    load()
    for p, q in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert p["step"] > q["step"] == 2
        assert "momentum_buffer" in q
    assert all(group["dampening"] == 0.5 for group in other.param_groups)


@pytest.mark.parametrize("keys", [{}, {"ramp": 5}, {"stall": 2}, {"anchor_decay": 1.0}], ids=str)
@pytest.mark.parametrize("unfused", [False, True])
def test_reading_a_fresh_state_is_no_step(keys, unfused):
    model = nn.Linear(4, 3)
    if unfused:
        optimizer = torch.optim.AdamW([{"params": list(model.parameters()), **keys}])
        fast.optim.UnfusedPull(optimizer)
    else:
        optimizer = fast.AdamW([{"params": list(model.parameters()), **keys}])
    get_state_dict(model, optimizer)
    assert all("step" in optimizer.state[p] for p in model.parameters())
    (group,) = optimizer.param_groups
    assert group.get("progress", 0) == 0
    other = copy.deepcopy(model)
    fresh = fast.AdamW([{"params": list(other.parameters()), **keys}])
    for step in range(1, 4):
        for net, opt in ((model, optimizer), (other, fresh)):
            net(torch.ones(2, 4)).square().sum().backward()
            opt.step()
        assert group.get("progress", step) == step
    if not unfused:  # torch's optimizers count it in `step`
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("unfused", [False, True])
def test_a_first_step_at_learning_rate_0_counts(unfused):
    """That of a warm-up, whose gradients are not 0."""
    model = nn.Linear(4, 3)
    groups = [{"params": list(model.parameters()), "ramp": 5}]
    optimizer = torch.optim.AdamW(groups) if unfused else fast.AdamW(groups)
    pull = fast.optim.UnfusedPull(optimizer) if unfused else None
    optimizer.param_groups[0]["lr"] = 0.0
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["progress"] == 1
    if pull is not None:
        pull.remove()


@pytest.mark.parametrize("how", ["group", "curvature", "some anchors"])
def test_one_state_means_a_state_for_every_parameter(how):
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = fast.AdamW([{"params": [params[0], frozen]}, {"params": params[1:2]}])
    assert not optimizer.state, "no pull, no memory"
    if how == "group":
        optimizer.add_param_group({"params": params[2:], "anchor_decay": 1.0})
    elif how == "curvature":
        optimizer.add_param_group({"params": params[2:], "curvature": [None]})
    else:
        optimizer.add_param_group({"params": params[2:]})
        optimizer.set_anchors({params[0]: torch.zeros(2)})
    assert all(set(optimizer.state[p]) >= {"step", "exp_avg", "exp_avg_sq"} for p in params)
    assert frozen not in optimizer.state
