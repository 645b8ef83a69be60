"""Kinds of tensors, states and groups that once went wrong."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from torch import nn

import fast
from fastkernels import _native, _update_native


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def test_a_gradient_that_is_still_being_reduced():
    """A wrapper has no memory of its own; a raw pointer to it crashed."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    p = parameter(1.0, 2.0)
    p.grad = AsyncCollectiveTensor(torch.ones(2))
    fast.SGD([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 1.9]))


def test_negative_views_are_read_as_what_they_are():
    re, im = parameter(1.0), parameter(2.0)
    (torch.complex(re, im).conj() ** 2).real.sum().backward()
    expected = im.item() - 0.1 * im.grad.item()
    fast.SGD([im], lr=0.1).step()
    assert im.item() == pytest.approx(expected)
    p = nn.Parameter(torch.zeros(5000))
    p.grad = torch._neg_view(torch.ones(5000))
    fast.SGD([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((5000,), 0.1))


def test_a_pull_beyond_all_bounds_is_the_anchor_itself():
    for anchor_decay, curvature in ((1e3, 1e37), (math.inf, 1.0), (1e38, 1e38)):
        p = parameter(1.0, 2.0)
        p.grad = torch.ones(2)
        options = {"anchor_decay": anchor_decay, "curvature": [torch.full((2,), curvature)]}
        fast.AdamW([p], lr=0.1, **options).step()
        torch.testing.assert_close(p.detach(), torch.tensor([1.0, 2.0]))


def test_an_anchor_that_its_dtype_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"anchor: a value is too large for torch\.float16"):
        fast.AdamW([parameter(1e5)], anchor_decay=1.0, anchor_dtype=torch.float16)


@pytest.mark.parametrize("began", ["with an anchor", "with a step"])
def test_exact_bf16_of_a_model_that_became_bf16_later(began):
    model = nn.Linear(3, 1)
    decay = 1e-9 if began == "with an anchor" else 0.0
    optimizer = fast.AdamW(model.parameters(), lr=1e-5, exact_bf16=True, anchor_decay=decay)
    if began == "with a step":
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    model.to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(400):
        model.weight.grad = torch.ones_like(model.weight)
        model.bias.grad = torch.ones_like(model.bias)
        optimizer.step()
    # 400 steps of 1e-5: below half a unit in the last place each, and together above one.
    assert model.weight.float().max() < 0.9985


def test_figures_are_those_of_the_last_step():
    a, b = parameter(1.0), nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = fast.SGD([a, b], lr=0.1)
    a.grad, b.grad = torch.full((1,), 3.0), torch.full((1,), 4.0, dtype=torch.float64)
    optimizer.step()
    assert optimizer.stats()["grad_norm"] == pytest.approx(5)
    a.grad = None
    optimizer.step()
    assert optimizer.stats()["grad_norm"] == pytest.approx(4)


def test_plans_of_changing_sets_of_gradients_are_kept():
    """Alternating heads of one size evicted each other's plan at every step."""
    if not _native.available()[0] or os.environ.get("FASTKERNELS_BACKEND", "native") != "native":
        pytest.skip("the native kernels are not built, or not asked for")
    body = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    heads = [[nn.Parameter(torch.randn(3))] for _ in range(2)]
    optimizer = fast.AdamW([*body, *heads[0], *heads[1]])
    built, build = [], _update_native._plans._build
    _update_native._plans._build = lambda batch, *what: built.append(1) or build(batch, *what)
    try:
        for step in range(8):
            for p in (*body, *heads[0], *heads[1]):
                p.grad = None
            for p in (*body, *heads[step % 2]):
                p.grad = torch.randn(3)
            optimizer.step()
    finally:
        _update_native._plans._build = build
    assert len(built) == 2


def test_a_rate_of_zero_after_a_tensor_rate():
    p = parameter(1.0)
    optimizer = fast.SGD([p], lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        p.grad = torch.ones(1)
        step()
    before = p.item()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.item() == before


def test_a_group_that_is_added_later_counts_its_own_steps():
    p, q = parameter(1.0), parameter(1.0)
    optimizer = fast.SGD([p], lr=0.1, stall=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    p.grad = torch.ones(1)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    optimizer.add_param_group({"params": [q], "stall": 3})
    assert optimizer.param_groups[1]["progress"] == 0


def test_a_default_device_is_none_of_our_business():
    p = parameter(1.0)
    p.grad = torch.ones(1)
    optimizer = fast.SGD([p], lr=0.1)
    with torch.device("meta"):
        optimizer.step()
    assert p.item() == pytest.approx(0.9)


def test_curvature_is_split_with_the_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    found = [torch.full_like(p, float(i)) for i, p in enumerate(model[0].parameters())]
    groups = fast.param_groups(model, curvature=found, weight_decay=0.1, anchor_decay=1.0)
    given = {g["name"]: [float(f.mean()) for f in g.get("curvature", [])] for g in groups}
    assert given["backbone"] == [0.0]
    assert given["backbone_no_decay"] == [1.0]
    fast.AdamW(groups)
    with pytest.raises(ValueError, match="curvature has 1 entries for 2 backbone"):
        fast.param_groups(model, curvature=found[:1])


def foreign_states():
    def state(make):
        p = parameter(1.0)
        optimizer = make([p])
        p.grad = torch.ones(1)
        optimizer.step()
        return optimizer.state_dict()

    adamw = state(torch.optim.AdamW)
    incomplete = copy.deepcopy(adamw)
    del incomplete["state"][0]["exp_avg_sq"]
    return {
        "SGD's": (state(torch.optim.SGD), "is not one of AdamW: its groups have no betas, eps"),
        "Adam's": (
            state(lambda p: torch.optim.Adam(p, weight_decay=0.1)),
            "whose weight decay goes into the gradient",
        ),
        "half a state": (incomplete, "has exp_avg but not all of"),
        "no state": ({}, "has no 'state'"),
        "a list": (adamw | {"state": {0: [1]}}, "must be a dict"),
    }


@pytest.mark.parametrize("which", ["SGD's", "Adam's", "half a state", "no state", "a list"])
def test_states_of_others_are_refused_and_change_nothing(which):
    state, message = foreign_states()[which]
    optimizer = fast.AdamW([parameter(1.0)], lr=0.5)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5


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


def test_bad_anchors_are_named():
    optimizer = fast.AdamW([parameter(1.0)], anchor_decay=1.0)
    with pytest.raises(ValueError, match=r"anchors\[0\] must be a tensor; got NoneType"):
        optimizer.set_anchors([None])
