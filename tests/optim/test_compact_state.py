"""State in few bytes: trains as well, is saved and loaded bit for bit, and torch can read it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fast
from fast.optim import SGD, AdamW
from optim.small_networks import batch, flat, network, train

COMPACT = {
    "bfloat16": {"state_dtype": torch.bfloat16, "anchor_dtype": torch.bfloat16},
    "codes": {"state_dtype": torch.uint8, "curvature_dtype": torch.uint8},
}
compact = pytest.mark.parametrize("options", COMPACT.values(), ids=COMPACT)


def make(cls, model: nn.Module, options) -> torch.optim.Optimizer:
    torch.manual_seed(2)
    f = [torch.rand_like(p) for p in model.parameters()]
    extra = {"momentum": 0.9} if cls is SGD else {}
    return cls(model.parameters(), lr=1e-2, anchor_decay=0.1, curvature=f, **extra, **options)


@compact
@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_trains_as_well(cls, options):
    losses = []
    for some in ({}, options):
        model = network()
        train(make(cls, model, some), model, 60)
        losses.append(batch(model).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.02)
    assert losses[1] < 0.8 * batch(network()).item()


@compact
@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_resume_is_exact(cls, options):
    model = network()
    optimizer = make(cls, model, options)
    train(optimizer, model, 5)
    twin = copy.deepcopy(model)
    other = make(cls, twin, options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, 5)
    train(other, twin, 5)
    assert torch.equal(flat(model), flat(twin))


@compact
def test_torch_goes_on_after_a_detour_through_float32(options):
    model = network()
    optimizer = make(AdamW, model, options)
    train(optimizer, model, 5)
    dense = make(AdamW, model, {})
    dense.load_state_dict(optimizer.state_dict())
    reference = network()
    never_compact = make(AdamW, reference, {})
    train(never_compact, reference, 5)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            ours, truth = dense.state[p][name], never_compact.state[q][name]
            torch.testing.assert_close(ours, truth, rtol=0.1, atol=0.05 * truth.abs().max().item())
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(dense.state_dict())
    before = batch(model).item()
    train(theirs, model, 20)
    assert batch(model).item() < before


def test_torch_state_becomes_compact_when_loaded():
    model = network()
    theirs = torch.optim.AdamW(model.parameters())
    train(theirs, model, 3)
    optimizer = AdamW(model.parameters(), state_dtype=torch.uint8)
    optimizer.load_state_dict(theirs.state_dict())
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["exp_avg_sq_codes"].dtype == torch.uint8
        assert "exp_avg_sq" not in state
    train(optimizer, model, 1)


def test_bytes_per_parameter():
    def size(**options) -> float:
        p = nn.Parameter(torch.randn(1024, 128))
        AdamW([p], anchor_decay=0.1, curvature=[torch.rand_like(p)], **options)
        optimizer = AdamW([p], anchor_decay=0.1, curvature=[torch.rand_like(p)], **options)
        state = optimizer.state[p].values()
        return sum(t.nbytes for t in state) / p.numel()

    half, codes = torch.bfloat16, torch.uint8
    assert size() == pytest.approx(16, abs=0.01)
    assert size(state_dtype=half, anchor_dtype=half, curvature_dtype=half) == pytest.approx(
        8, abs=0.01
    )
    eight = size(state_dtype=codes, anchor_dtype=half, curvature_dtype=codes)
    assert eight == pytest.approx(5.09, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_compact_curvature_weights_the_pull(cls, dtype):
    """Without gradients a step is the pull alone. That of float64 parameters stays exact."""
    f = torch.linspace(0.1, 10.0, 300)
    params = [nn.Parameter(torch.zeros(300, dtype=t)) for t in (torch.float32, torch.float64)]
    optimizer = cls(
        params, lr=1.0, anchor_decay=1.0, curvature=[f, f.double()], curvature_dtype=dtype
    )
    for p in params:
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, error in zip(params, (0.1, 1e-6), strict=True):
        torch.testing.assert_close(p.double(), 1 / (1 + f.double()), rtol=error, atol=0)


def test_float64_parameters_stay_exact():
    p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer = AdamW([p], state_dtype=torch.uint8, anchor_decay=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("exact", [False, True])
def test_bf16_parameters(exact):
    """Steps below their precision are lost without the remainders and kept with them."""
    model = network(torch.bfloat16)
    reference = network(torch.bfloat16).float()
    optimizer = AdamW(model.parameters(), lr=1e-5, exact_bf16=exact)
    assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-5, weight_decay=0.0)
    start = flat(model)
    for _ in range(40):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
        optimizer.step()
        theirs.step()
    stuck = (flat(model) == start).float().mean()
    if not exact:
        assert stuck > 0.8
        return
    remainders = [optimizer.state[p]["remainder"] for p in model.parameters()]
    assert any(r.count_nonzero() for r in remainders)
    torch.testing.assert_close(flat(model), flat(reference).bfloat16(), rtol=0.008, atol=0)
    assert stuck < 0.8


def test_mixed_dtypes_in_one_step():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3).double()])
    optimizer = AdamW(
        model.parameters(), lr=0.1, state_dtype=torch.uint8, exact_bf16=True, anchor_decay=0.1
    )
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(
            (b - p).double(), torch.full_like(p, 0.1).double(), atol=0.02, rtol=0
        )


def test_same_seed_same_bits_other_seed_other_bits():
    weights = []
    for seed in (0, 0, 1):
        model = network()
        optimizer = AdamW(model.parameters(), state_dtype=torch.bfloat16, seed=seed)
        train(optimizer, model, 5)
        weights.append(flat(model))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_codes_under_another_default_dtype():
    weights = []
    for dtype in (torch.float64, torch.float32):
        model = network()
        torch.set_default_dtype(dtype)
        try:
            optimizer = make(AdamW, model, COMPACT["codes"])
            for _ in range(2):
                for p in model.parameters():
                    p.grad = p.detach().clone()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(flat(model))
    assert torch.equal(*weights)


def test_exact_parameters_that_are_float32_now():
    """The bits that bf16 lacked are of no use to a model that was moved to float32."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.bfloat16)
    optimizer = AdamW(layer.parameters(), lr=1e-3, exact_bf16=True)
    layer(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    layer.float()
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert all("remainder" not in state for state in optimizer.state.values())


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
