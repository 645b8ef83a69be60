"""Drop-in for torch: the same results without an anchor, and the same ways to be used."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fast.optim import SGD, AdamW
from helpers import assert_no_worse_than_torch
from optim.small_networks import batch, flat, network, train

PAIRS = {
    "adamw": (torch.optim.AdamW, AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw_betas": (
        torch.optim.AdamW,
        AdamW,
        {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0},
    ),
    "adamw_maximize": (
        torch.optim.AdamW,
        AdamW,
        {"lr": 1e-3, "maximize": True, "weight_decay": 0.0},
    ),
    "sgd": (torch.optim.SGD, SGD, {"lr": 0.1}),
    "sgd_momentum": (torch.optim.SGD, SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd_dampening": (torch.optim.SGD, SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "sgd_nesterov": (torch.optim.SGD, SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}
pairs = pytest.mark.parametrize(("theirs", "ours", "options"), PAIRS.values(), ids=PAIRS)


@pairs
def test_same_results(theirs, ours, options):
    weights = []
    for cls, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        model = network(dtype)
        train(cls(model.parameters(), **options), model)
        weights.append(flat(model))
    assert_no_worse_than_torch(*weights)
    assert not torch.equal(weights[0], flat(network()))


@pairs
def test_channels_last_and_frozen_and_unused(theirs, ours, options):
    weights = []
    for cls in (ours, theirs):
        model = network().to(memory_format=torch.channels_last)
        model.append(nn.Linear(5, 5))  # never run through: no gradient
        model[0].bias.requires_grad_(False)
        optimizer = cls(model.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            head = model[:4]
            batch(head).backward()
            optimizer.step()
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=2e-6, atol=1e-6)


@pairs
def test_checkpoints_of_torch_and_back(theirs, ours, options):
    """Half a run here, half there, in both orders: as a whole run of torch."""
    reference = network()
    train(theirs(reference.parameters(), **options), reference, 10)
    for first, second in ((theirs, ours), (ours, theirs), (ours, ours)):
        model = network()
        optimizer = first(model.parameters(), **options)
        train(optimizer, model, 5)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        optimizer = second(model.parameters(), lr=123.0)
        optimizer.load_state_dict(state)
        train(optimizer, model, 5)
        torch.testing.assert_close(flat(model), flat(reference), rtol=2e-6, atol=2e-6)


@pairs
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on(theirs, ours, options, clone):
    model = network()
    optimizer = ours(model.parameters(), anchor_decay=0.1, max_grad_norm=1.0, **options)
    train(optimizer, model, 3)
    twin, twin_optimizer = clone((model, optimizer))
    train(optimizer, model, 3)
    train(twin_optimizer, twin, 3)
    assert torch.equal(flat(model), flat(twin))
    assert twin_optimizer.max_grad_norm == 1.0


def test_fresh_state_goes_through_a_round_trip():
    """accelerate loads a fresh optimizer's own state dict before the first step."""
    model, twin = network(), network()
    optimizer, plain = (AdamW(m.parameters(), anchor_decay=0.1) for m in (model, twin))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, model, 3)
    train(plain, twin, 3)
    assert torch.equal(flat(model), flat(twin))


def test_closure_runs_with_gradients():
    model = network()
    optimizer = AdamW(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = batch(model)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


def test_step_hooks():
    seen = []
    model = network()
    optimizer = AdamW(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(optimizer, model, 1)
    assert seen == ["pre", "post"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1),
    ],
    ids=["cosine", "one_cycle", "linear"],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedules(schedule, tensor_lr):
    weights = []
    for cls in (AdamW, torch.optim.AdamW):
        model = network()
        lr = torch.tensor(1e-2) if tensor_lr else 1e-2
        optimizer = cls(model.parameters(), lr=lr, weight_decay=0.0)
        scheduler = schedule(optimizer)
        for _ in range(8):
            train(optimizer, model, 1)
            scheduler.step()
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_grad_scaler(ours, theirs, unscale):
    """Scaled, with an overflow in the middle: that step changes nothing at all."""
    weights = []
    for cls in (ours, theirs):
        model = network()
        optimizer = cls(model.parameters(), lr=1e-2, weight_decay=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        for i in range(8):
            optimizer.zero_grad()
            loss = scaler.scale(batch(model))
            (loss * float("inf") if i == 4 else loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            before = copy.deepcopy((flat(model), optimizer.state_dict()["state"]))
            scaler.step(optimizer)
            scaler.update()
            if i == 4:
                assert torch.equal(before[0], flat(model))
                after = optimizer.state_dict()["state"]
                for key, state in before[1].items():
                    for name, value in state.items():
                        assert value is None or torch.equal(value, after[key][name])
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("stall", [0, 9], ids=["stepped", "stalled"])
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_leaves_gradients_unscaled(unscale, clip, stall):
    """As torch's optimizers do, each gradient once, of stalled groups too; and not clipped."""
    grads = []
    for scale in (1.0, 1024.0):
        model = network()
        optimizer = AdamW(model.parameters(), max_grad_norm=clip, stall=stall)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(batch(model)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


def test_grad_scaler_leaves_gradients_of_a_skipped_step():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(batch(model)).backward()
    next(model.parameters()).grad[0] = torch.inf
    before = [p.grad.clone() for p in model.parameters()]
    scaler.step(AdamW(model.parameters()))
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, b, equal_nan=True, rtol=0, atol=0)


def test_groups_and_added_groups():
    weights = []
    for cls in (AdamW, torch.optim.AdamW):
        model = network()
        optimizer = cls(
            [
                {"params": model[0].weight, "lr": 1e-3},
                {"params": [model[0].bias], "betas": (0.5, 0.9)},
            ],
            lr=1e-2,
            weight_decay=0.0,
        )
        train(optimizer, model, 2)
        optimizer.add_param_group({"params": model[3].parameters(), "weight_decay": 0.5})
        train(optimizer, model, 2)
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=2e-6, atol=2e-6)


def test_named_parameters():
    model = network()
    optimizer = AdamW(model.named_parameters())
    train(optimizer, model, 1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_tied_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = AdamW(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    moved = (model[0].weight - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1))


def test_step_in_backward():
    """torch's post-accumulate hooks: an optimizer per parameter, stepped while gradients arrive."""
    model, twin = network(), network()
    optimizers = {p: AdamW([p], lr=1e-2) for p in model.parameters()}

    def hook(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        batch(model).backward()
    train(AdamW(twin.parameters(), lr=1e-2), twin, 3)
    torch.testing.assert_close(flat(model), flat(twin))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative; got -1.0"),
        ({"lr": torch.ones(2)}, "lr must have one element"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\); got 1.0"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not"),
        ({"anchor_decay": float("nan")}, "anchor_decay must not be negative; got nan"),
        ({"stall": -1}, "stall must not"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"state_dtype": torch.int64}, "state_dtype must be None or one of"),
        ({"anchor_dtype": torch.uint8}, "anchor_dtype must be None or one of"),
        ({"amsgrad": True}, "amsgrad=True is not supported; use torch.optim.AdamW"),
        ({"differentiable": True}, "differentiable=True is not supported; use torch.optim.AdamW"),
        ({"betas": (0.9,)}, r"betas must be two numbers, \(beta1, beta2\); got \(0.9,\)"),
        ({"betas": 0.9}, "betas must be two numbers"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.zeros(2))], **options)


@pairs
def test_options_of_torch_that_change_nothing(theirs, ours, options):
    weights = []
    for ignored in ({}, {"foreach": False, "fused": False, "differentiable": False}):
        model = network()
        train(ours(model.parameters(), **options, **ignored), model)
        weights.append(flat(model))
    assert torch.equal(*weights)


def test_bad_sgd_options_are_named():
    with pytest.raises(ValueError, match="momentum must not be negative"):
        SGD([nn.Parameter(torch.zeros(2))], momentum=-1)
    with pytest.raises(ValueError, match="nesterov needs"):
        SGD([nn.Parameter(torch.zeros(2))], nesterov=True)
    with pytest.raises(ValueError, match=r"differentiable=True is .*torch\.optim\.SGD"):
        SGD([nn.Parameter(torch.zeros(2))], differentiable=True)


def test_what_cannot_be_updated_is_refused():
    with pytest.raises(ValueError, match="view_as_real"):
        AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert not optimizer.state, "a refused step must leave no state behind"


def test_amsgrad_checkpoint_is_refused():
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    train(theirs, model, 1)
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW(model.parameters()).load_state_dict(theirs.state_dict())


def test_a_refused_group_is_not_kept():
    optimizer = AdamW([nn.Parameter(torch.zeros(2))])
    p = nn.Parameter(torch.zeros(2))
    for key, bad in (("lr", -1.0), ("curvature", [torch.ones(3)]), ("curvature", 5.0)):
        with pytest.raises((ValueError, TypeError), match=key):
            optimizer.add_param_group({"params": [p], "anchor_decay": 1.0, key: bad})
        assert len(optimizer.param_groups) == 1
        assert p not in optimizer.state
    optimizer.add_param_group({"params": [p], "curvature": [torch.ones(2)]})


@pytest.mark.parametrize(
    "curvature", [5.0, {"w": torch.ones(2)}, torch.ones(1, 2), [1.0], [[1.0, 1.0]]]
)
def test_what_is_no_curvature_is_named(curvature):
    with pytest.raises(TypeError, match="curvature"):
        AdamW([nn.Parameter(torch.zeros(2))], curvature=curvature)


@pytest.mark.parametrize("seed", [-1, 1.5, 2**64])
def test_seed_is_checked_at_once(seed):
    with pytest.raises(ValueError, match="seed"):
        AdamW([nn.Parameter(torch.zeros(2))], seed=seed)


def test_a_loaded_group_is_checked():
    optimizer = AdamW([nn.Parameter(torch.zeros(2))])
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-3
