"""What the optimizers refuse, by name and before anything changes; states in the old 8-bit code."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fast
from fast import dtensor
from fast.dtensor import Place
from fast.optim import storage
from fastkernels import codes as codec
from optim.small_networks import parameter

STATE_DTYPES = [None, torch.bfloat16, torch.uint8]


def stepped(cls=fast.AdamW, n: int = 9, **options: Any) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.ones(n))
    p.grad = torch.ones(n)
    optimizer = cls([p], **options)
    optimizer.step()
    return p, optimizer


def refused_step(optimizer: Any, p: nn.Parameter, error: type[Exception], message: str) -> None:
    before = p.detach().clone(), copy.deepcopy(dict(optimizer.state[p]))
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(before[0], p)
    assert all(torch.equal(value, before[1][key]) for key, value in optimizer.state[p].items())


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_a_part_of_a_state_that_was_taken_away(name, state_dtype):
    p, optimizer = stepped(state_dtype=state_dtype)
    coded = state_dtype == torch.uint8 and name != "step"
    del optimizer.state[p][f"{name}_codes" if coded else name]
    refused_step(optimizer, p, RuntimeError, f"no '{name}': somebody took it away")


@pytest.mark.parametrize(
    ("options", "key", "value", "message"),
    [
        ({}, "exp_avg", torch.empty(0), r"exp_avgs\[0\] is \[0\]"),
        ({}, "exp_avg_sq", torch.zeros(4), r"exp_avg_sqs\[0\] is \[4\]"),
        ({}, "step", torch.zeros(2), r"steps\[0\] must be float32 with 1 elements"),
        ({"anchor_decay": 0.1}, "anchor", torch.empty(0), r"anchors\[0\] is \[0\]"),
        (
            {"state_dtype": torch.uint8},
            "exp_avg_scales",
            torch.empty(0),
            r"exp_avg_scales\[0\] must be float32",
        ),
    ],
)
def test_a_part_of_a_state_of_another_size(options, key, value, message):
    p, optimizer = stepped(**options)
    optimizer.state[p][key] = value
    refused_step(optimizer, p, ValueError, message)


def test_a_momentum_that_was_emptied():
    p, optimizer = stepped(fast.SGD, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.empty(0)
    refused_step(optimizer, p, ValueError, r"a momentum_buffer is \[0\], its parameter \[9\]")


def test_a_momentum_that_was_taken_away_begins_anew():
    p, optimizer = stepped(fast.SGD, momentum=0.9, lr=1.0)
    del optimizer.state[p]["momentum_buffer"]
    optimizer.step()
    assert p.tolist() == [-1.0] * 9


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (fast.AdamW, "lr", -1.0), (fast.AdamW, "lr", math.inf), (fast.AdamW, "lr", math.nan),
        (fast.AdamW, "lr", torch.tensor(-1.0)), (fast.AdamW, "lr", "x"),
        (fast.AdamW, "betas", (2, 3)), (fast.AdamW, "betas", (0.9, 1)), (fast.AdamW, "betas", 0.9),
        (fast.AdamW, "eps", -1.0), (fast.AdamW, "eps", math.inf), (fast.AdamW, "ramp", -3),
        (fast.AdamW, "weight_decay", -1.0), (fast.AdamW, "anchor_decay", -1.0),
        (fast.AdamW, "ramp", math.nan), (fast.AdamW, "stall", -1), (fast.AdamW, "ramp", "x"),
        (fast.SGD, "momentum", -0.5), (fast.SGD, "momentum", math.inf),
        (fast.SGD, "dampening", math.nan), (fast.SGD, "weight_decay", None),
    ],
)  # fmt: skip
def test_a_value_that_is_changed_later_is_checked(cls, key, value):
    """In the second of two groups: the first must not have moved then."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer = cls([{"params": [a]}, {"params": [b]}], anchor_decay=0.1)
    optimizer.step()
    optimizer.param_groups[1][key] = value
    before = a.detach().clone()
    with pytest.raises(ValueError, match=key):
        optimizer.step()
    assert torch.equal(a, before)
    with pytest.raises(ValueError, match=key):
        cls([{"params": [a], key: value}])


def test_a_rate_that_is_changed_in_place_is_checked():
    lr = torch.tensor(0.1)
    p, optimizer = stepped(lr=lr)
    lr.fill_(-1.0)
    refused_step(optimizer, p, ValueError, "lr must not be negative")


def test_aliases():
    p = nn.Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        fast.AdamW([p, p])
    q = nn.Parameter(p.detach()[1:])
    p.grad, q.grad = torch.ones(4), torch.ones(3)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        fast.AdamW([p, q]).step()
    assert p.tolist() == [1.0] * 4
    p.grad = p.detach()
    with pytest.raises(ValueError, match=r"grads\[0\] and params\[0\] share memory"):
        fast.AdamW([p]).step()


def test_inference_mode_makes_no_state():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = fast.AdamW([p])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()


GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
HALF = torch.full((4,), 0.5)
BNB = {"step": 5000, "state1": HALF, "state2": HALF}
MOMENTS = {"exp_avg": HALF, "exp_avg_sq": HALF}


@pytest.mark.parametrize(
    ("cls", "state", "group", "message"),
    [
        (fast.AdamW, MOMENTS, GROUP | {"step": 5000}, "no 'step'; its group has step 5000"),
        (fast.AdamW, MOMENTS, GROUP, "no 'step': add it"),
        (fast.AdamW, {"step": 5000}, GROUP, "has a step but none of"),
        (fast.AdamW, BNB, GROUP, "has 'state1', 'state2', which no AdamW has"),
        (fast.AdamW, BNB | MOMENTS, GROUP, "has 'state1', 'state2', which no AdamW has"),
        (fast.SGD, {"state1": HALF}, {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
         "has 'state1', which no SGD has"),
    ],
)  # fmt: skip
def test_states_that_only_look_like_ours(cls, state, group, message):
    optimizer = cls([nn.Parameter(torch.ones(4))])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": [group | {"params": [0]}]})
    assert not optimizer.state


@pytest.mark.parametrize(
    ("name", "cls", "missing"),
    [
        ("NAdam", fast.AdamW, "amsgrad"),
        ("RAdam", fast.AdamW, "amsgrad"),
        ("Adamax", fast.AdamW, "amsgrad"),
        ("Muon", fast.SGD, "dampening"),
        ("RMSprop", fast.SGD, "dampening, nesterov"),
    ],
)
def test_states_of_torchs_other_optimizers(name, cls, missing):
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    theirs = getattr(torch.optim, name)([p])
    theirs.step()
    with pytest.raises(ValueError, match=f"{cls.__name__}: its groups have no {missing}"):
        cls([p]).load_state_dict(theirs.state_dict())


def in_first_format(optimizer: fast.AdamW, x: torch.Tensor) -> dict[str, Any]:
    """A state with `x` as its momentum, in the code of eighths of an octave of `y + 1`."""
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["code_format"]
    top = 1.875 * 2.0**15 - 1
    scale = x.abs().max() / top
    code = torch.round(8 * torch.log2((x.abs() / scale + 1).double())).clamp(max=127)
    saved["state"][0]["exp_avg_codes"] = (code + 128 * (x < 0)).to(torch.uint8)
    saved["state"][0]["exp_avg_scales"] = scale.reshape(1)
    return saved


def test_states_in_the_first_8_bit_code_are_converted():
    x = torch.linspace(-1, 1, 9)
    p, optimizer = stepped(state_dtype=torch.uint8)
    optimizer.load_state_dict(in_first_format(optimizer, x))
    state = optimizer.state[p]
    decoded = codec.decode(state["exp_avg_codes"], state["exp_avg_scales"], signed=True)
    torch.testing.assert_close(decoded, x, rtol=0.15, atol=0.01)
    assert optimizer.param_groups[0]["code_format"] == storage.CODE_FORMAT
    plain = stepped(n=9)[1]
    plain.load_state_dict(in_first_format(optimizer, x))
    (state,) = plain.state.values()
    torch.testing.assert_close(state["exp_avg"], x, rtol=0.15, atol=0.01)


def test_codes_of_a_later_format_are_refused():
    _, optimizer = stepped(state_dtype=torch.uint8)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["code_format"] = 3
    with pytest.raises(ValueError, match="8-bit codes are of format 3, this version knows up to 2"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_clip_coefficient_of_float64_parameters_is_float64(monkeypatch, sharded):
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    p.grad, q.grad = torch.randn(50, dtype=torch.float64), None
    q.grad = p.grad.clone()
    if sharded:
        monkeypatch.setattr(dtensor, "sum_over", lambda groups, values: values)
        monkeypatch.setattr(dtensor, "place", lambda t: Place(t.device, ("ranks",)))
        monkeypatch.setattr(dtensor, "any_sharded", lambda params: True)
    fast.SGD([p], lr=1.0, max_grad_norm=0.3).step()
    torch.nn.utils.clip_grad_norm_([q], 0.3)
    torch.optim.SGD([q], lr=1.0).step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": None}, "lr must be a number"),
        ({"lr": "x"}, "lr must be a number"),
        ({"eps": None}, "eps must be a number"),
        ({"betas": ("a", 0.9)}, r"betas\[0\] must be a number"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be a number"),
        ({"seed": 2**63}, "seed must be an integer in"),
        ({"curvature": [torch.ones(1).to_sparse()]}, r"curvature\[0\] is torch.sparse"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fast.AdamW([parameter(1.0)], **options)
