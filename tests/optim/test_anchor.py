"""The pull to the pretrained weights: what it does, where its state lives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fast
from fast.optim import SGD, AdamW
from optim.small_networks import batch, flat, network, parameter, train


def drift(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.stats()["drift"].item()


@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_pull_keeps_weights_near_the_start(cls):
    distances = []
    for decay in (0.0, 1.0, 100.0):
        model = network()
        start = flat(model)
        train(cls(model.parameters(), lr=1e-2, anchor_decay=decay), model, 20)
        distances.append((flat(model) - start).norm().item())
    assert distances[0] > 1.05 * distances[1] > 2 * distances[2]


def test_curvature_frees_what_does_not_matter():
    p = nn.Parameter(torch.zeros(4))
    optimizer = AdamW([p], lr=0.1, anchor_decay=100.0, curvature=[torch.tensor([0.0, 0, 1, 1])])
    for _ in range(10):
        p.grad = torch.ones(4)
        optimizer.step()
    assert p[:2].abs().min() > 0.9
    assert p[2:].abs().max() < 0.02


def test_unit_curvature_is_none():
    weights = []
    for curvature in (None, "ones"):
        model = network()
        f = [torch.ones_like(p) for p in model.parameters()] if curvature else None
        train(AdamW(model.parameters(), anchor_decay=0.5, curvature=f), model)
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_curvature_as_a_group_key_and_from_a_card():
    class Card:
        def curvature_for(self, params):
            return [torch.full_like(p, 2.0) for p in params]

    weights = []
    for how in ("argument", "key", "later"):
        model = network()
        params = list(model.parameters())
        if how == "argument":
            optimizer = AdamW(params, anchor_decay=0.5, curvature=Card())
        elif how == "key":
            values = [torch.full_like(p, 2.0) for p in params]
            optimizer = AdamW([{"params": params, "curvature": values}], anchor_decay=0.5)
        else:
            optimizer = AdamW(params, anchor_decay=0.5)
            optimizer.param_groups[0]["curvature"] = Card()
        train(optimizer, model, 3)
        weights.append(flat(model))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("curvature", "message"),
    [
        ([torch.ones(2)], "1 tensors for 2 parameters"),
        ([torch.ones(3), None], r"curvature\[0\] is \[3\], its parameter \[2\]"),
        ([None, -torch.ones(2)], r"curvature\[1\] has negative"),
        ([None, torch.full((2,), torch.nan)], "non-finite"),
    ],
)
def test_bad_curvature_is_named(curvature, message):
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        AdamW(params, anchor_decay=1.0, curvature=curvature)


def test_anchors_are_those_of_when_the_group_was_added():
    p, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], anchor_decay=0.5)
    with torch.no_grad():
        late.fill_(7.0)
    optimizer.add_param_group({"params": [late]})
    assert optimizer.state[p]["anchor"].tolist() == [1, 1, 1]
    assert optimizer.state[late]["anchor"].tolist() == [7, 7, 7]
    plain = AdamW([nn.Parameter(torch.ones(3))])
    assert not plain.state, "no pull, no memory"


def test_set_anchors():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    optimizer = AdamW([a, b], lr=0.0, anchor_decay=0.0)
    optimizer.set_anchors([torch.full((2,), 3.0), torch.full((3,), 4.0)])
    a.grad, b.grad = torch.zeros(2), torch.zeros(3)
    optimizer.step()
    assert drift(optimizer) == pytest.approx(math.sqrt(2 * 9 + 3 * 16))
    optimizer.set_anchors({b: torch.zeros(3)})
    optimizer.step()
    assert drift(optimizer) == pytest.approx(math.sqrt(2 * 9))
    optimizer.set_anchors()
    optimizer.step()
    assert drift(optimizer) == 0.0
    with pytest.raises(ValueError, match="1 tensors for 2"):
        optimizer.set_anchors([torch.zeros(2)])
    with pytest.raises(ValueError, match=r"anchors\[1\] is \[2\]"):
        optimizer.set_anchors([torch.zeros(2), torch.zeros(2)])
    with pytest.raises(ValueError, match="not a parameter"):
        optimizer.set_anchors({torch.zeros(2): torch.zeros(2)})


def test_never_anchored_at_weights_that_may_have_moved():
    model = network()
    optimizer = AdamW(model.parameters())
    train(optimizer, model, 2)
    optimizer.param_groups[0]["anchor_decay"] = 0.5
    with pytest.raises(RuntimeError, match="set_anchors"):
        train(optimizer, model, 1)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_anchors_survive_a_checkpoint_with_their_dtype(dtype):
    model = network()
    optimizer = AdamW(model.parameters(), anchor_decay=0.5, anchor_dtype=dtype)
    start = [s["anchor"].clone() for s in optimizer.state.values()]
    train(optimizer, model, 3)
    state = optimizer.state_dict()
    again = AdamW(model.parameters(), anchor_decay=0.5, anchor_dtype=dtype)
    for p, s in again.state.items():  # a new optimizer is anchored at the weights of now
        assert torch.equal(s["anchor"], p.detach().to(dtype or torch.float32))
    again.load_state_dict(state)
    for s, anchor in zip(again.state.values(), start, strict=True):
        assert s["anchor"].dtype == (dtype or torch.float32)
        assert torch.equal(s["anchor"], anchor)


def test_torch_checkpoint_keeps_the_anchors_there_are():
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model.parameters(), anchor_decay=0.5, stall=1)
    theirs = torch.optim.AdamW(model.parameters())
    train(theirs, model, 3)
    with pytest.warns(UserWarning, match="no anchor for 4 anchored parameters"):
        optimizer.load_state_dict(theirs.state_dict())
    anchors = [optimizer.state[p]["anchor"] for p in model.parameters()]
    assert all(map(torch.equal, anchors, start))
    group = optimizer.param_groups[0]
    assert (group["anchor_decay"], group["stall"], group["weight_decay"]) == (0.5, 1, 0.01)


def test_clipping_is_that_of_torch():
    weights = []
    for ours in (True, False):
        model = network()
        options = {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-2}
        if ours:
            optimizer = AdamW(model.parameters(), max_grad_norm=0.05, **options)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **options)
        for _ in range(5):
            optimizer.zero_grad()
            batch(model).backward()
            if not ours:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


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


def test_bad_anchors_are_named():
    optimizer = fast.AdamW([parameter(1.0)], anchor_decay=1.0)
    with pytest.raises(ValueError, match=r"anchors\[0\] must be a tensor; got NoneType"):
        optimizer.set_anchors([None])
