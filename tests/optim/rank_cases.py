"""Runs on every rank: `python -m rank_cases CASE RANK WORLD FOLDER` (test_distributed).

Each case trains the same network on the same whole batch without sharding beside it, and compares.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fast
import fast.optim
from fast.adapt.guards.weight_average import WeightAverage

BATCH, STEPS = 8, 4
# The gradient is a sum over ranks in another order; Adam makes of a difference near zero up to lr.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def network(outputs: int = 1) -> nn.Module:
    """Over two ranks: rows that do not divide evenly (5, 7), and one row, empty on the second."""
    torch.manual_seed(0)
    body = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh()
    return nn.Sequential(*body, nn.Linear(7, outputs))


def batches() -> list[Tensor]:
    return list(torch.randn(STEPS, BATCH, 6, generator=torch.Generator().manual_seed(1)))


def groups(model: nn.Module, **keys: Any) -> list[dict[str, Any]]:
    """A backbone with an anchor, a head without."""
    *body, weight, bias = model.parameters()
    return [{"params": body, "anchor_decay": 0.5, **keys}, {"params": [weight, bias], "lr": 0.05}]


def train(model: nn.Module, opt: Any, xs: list[Tensor], share: slice = slice(None)) -> None:
    for x in xs:
        opt.zero_grad()
        model(x[share]).square().mean().backward()
        opt.step()


def share_of(rank: int, world: int) -> slice:
    return slice(rank * BATCH // world, (rank + 1) * BATCH // world)


def assert_same(sharded: nn.Module, whole: nn.Module) -> None:
    for (name, a), b in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        full = a.full_tensor() if isinstance(a, DTensor) else a
        torch.testing.assert_close(full.detach(), b.detach(), **CLOSE, msg=lambda m, n=name: n + m)


def sharded_network(world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    return fully_shard(network(), mesh=mesh)


def options() -> list[dict[str, Any]]:
    return [
        {"lr": 0.01},
        {"lr": 0.01, "max_grad_norm": 0.05},
        {"lr": 0.01, "anchor_dtype": torch.bfloat16, "weight_decay": 0.1},
    ]


def fsdp(rank: int, world: int, folder: Path) -> None:
    """Sharded steps, clip and figures are those of the whole network."""
    for keys in options():
        whole, model = network(), sharded_network(world)
        curvature = [torch.rand_like(p) for p in list(whole.parameters())[:-2]]
        a = fast.AdamW(groups(whole, curvature=curvature), **keys)
        b = fast.AdamW(groups(model, curvature=curvature), **keys)
        empty = [p for p in model.parameters() if p.to_local().numel() == 0]
        assert bool(empty) == (rank == 1)
        train(whole, a, batches())
        train(model, b, batches(), share_of(rank, world))
        assert_same(model, whole)
        assert all(
            isinstance(v, DTensor) and v.placements == p.placements
            for p, state in b.state.items()
            for key, v in state.items()
            if key != "step"
        )
        for key, figure in a.stats().items():
            torch.testing.assert_close(b.stats()[key], figure, rtol=1e-3, atol=1e-6)
        steps = {float(state["step"]) for state in b.state.values()}
        assert steps == {float(STEPS)}, steps


def fsdp_sgd(rank: int, world: int, folder: Path) -> None:
    whole, model = network(), sharded_network(world)
    keys = {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.1}
    train(whole, fast.SGD(groups(whole), **keys), batches())
    train(model, fast.SGD(groups(model), **keys), batches(), share_of(rank, world))
    assert_same(model, whole)


def unfused(rank: int, world: int, folder: Path) -> None:
    """The pull around torch's optimizer over shards is that over the whole network."""
    whole, model = network(), sharded_network(world)
    curvature = [torch.rand_like(p) for p in list(whole.parameters())[:-2]]
    pulls = []
    for net, share in ((whole, slice(None)), (model, share_of(rank, world))):
        opt = torch.optim.SGD(groups(net, curvature=curvature, stall=1), lr=0.1, momentum=0.9)
        pulls.append(fast.optim.UnfusedPull(opt, grad_norm=True))
        train(net, opt, batches(), share)
    assert_same(model, whole)
    a, b = (pull.stats() for pull in pulls)
    for key in ("grad_norm", "drift", "forgetting"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-6)


def checkpoint(rank: int, world: int, folder: Path) -> None:
    """Save, load into another optimizer over moved weights, go on: as if never stopped."""
    for index, keys in enumerate(options()):
        model = sharded_network(world)
        opt = fast.AdamW(groups(model, stall=1), **keys)
        train(model, opt, batches(), share_of(rank, world))
        path = folder / f"checkpoint-{index}"
        parts = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
        dcp.save(parts, checkpoint_id=path)
        train(model, opt, batches(), share_of(rank, world))

        again = sharded_network(world)
        with torch.no_grad():
            for p in again.parameters():
                p.add_(1.0)
        other = fast.AdamW(groups(again, stall=1), **keys)
        parts = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, other)}
        dcp.load(parts, checkpoint_id=path)
        again.load_state_dict(parts["model"])
        set_optimizer_state_dict(again, other, parts["optimizer"])
        train(again, other, batches(), share_of(rank, world))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
            for key, value in opt.state[p].items():
                loaded = other.state[q][key]
                assert type(loaded) is type(value), key
                assert loaded.dtype == value.dtype, key
                ours, theirs = (t.to_local() if key != "step" else t for t in (value, loaded))
                assert torch.equal(ours, theirs), key


def clip_in_double(rank: int, world: int, folder: Path) -> None:
    """The clip coefficient of float64 shards is float64."""
    whole, model = network().double(), network().double()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    keys = {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.01}
    xs = [x.double() for x in batches()]
    train(whole, fast.SGD(groups(whole), **keys), xs)
    train(model, fast.SGD(groups(model), **keys), xs, share_of(rank, world))
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-14, atol=1e-15)


def card(rank: int, world: int, folder: Path) -> None:
    """A card weights the pull of shards as that of the whole network, bound before or after."""
    xs = torch.cat(batches())
    whole, model = network(3), network(3)
    estimated = fast.SourceCard.estimate(model, xs, num_samples=16, calibration_samples=4)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    for given in (estimated, estimated.bind(model)):
        sharded = given.curvature_for(model.parameters())
        assert sharded[0].to_local().shape == next(iter(model.parameters())).to_local().shape
        a = fast.AdamW(groups(whole, anchor_decay=50.0), lr=0.01, curvature=estimated.bind(whole))
        b = fast.AdamW(groups(model, anchor_decay=50.0), lr=0.01, curvature=given)
        for (_, p), (_, q) in zip(a._members(), b._members(), strict=True):
            assert ("curvature" in a.state[p]) == ("curvature" in b.state[q])
            if "curvature" in a.state[p]:
                assert torch.equal(b.state[q]["curvature"].full_tensor(), a.state[p]["curvature"])
    of_whole, of_shards = estimated.bind(whole), estimated.bind(model)
    train(whole, a, batches())
    train(model, b, batches(), share_of(rank, world))
    assert_same(model, whole)
    for key, figure in a.stats().items():
        torch.testing.assert_close(b.stats()[key], figure, rtol=1e-3, atol=1e-6)
    energies = [of_shards.energy(model.parameters()), of_whole.energy(whole.parameters())]
    anchors = [p for _, p in network(3).named_parameters()]
    energies.append(of_shards.energy(model.parameters(), anchors))
    assert energies[1] > 0
    assert max(energies) < (1 + 1e-3) * min(energies)
    with pytest.raises(ValueError, match="of other weights"):
        estimated.bind(model)


def average(rank: int, world: int, folder: Path) -> None:
    """The average of sharded weights is that of the whole ones; it is applied, saved, adopted."""
    whole, model = network(), sharded_network(world)
    kept = [WeightAverage(list(m.parameters()), horizon=3) for m in (whole, model)]
    optimizers = [fast.AdamW(groups(m), lr=0.01) for m in (whole, model)]
    for step, x in enumerate(batches(), start=1):
        train(whole, optimizers[0], [x])
        train(model, optimizers[1], [x], share_of(rank, world))
        for guard in kept:
            guard.after_step(step)
            guard.keep()
    with kept[0].applied(), kept[1].applied():
        assert_same(model, whole)
    assert_same(model, whole)
    again = WeightAverage(list(model.parameters()), horizon=3)
    again.load_state_dict(copy.deepcopy(kept[1].state_dict()))
    kept[0].finish()
    again.finish()
    assert_same(model, whole)


def whole_into_sharded(rank: int, world: int, folder: Path) -> None:
    """A state of one process loads into a sharded optimizer, and whole anchors are taken."""
    whole, model = network(), sharded_network(world)
    a, b = (fast.AdamW(groups(m), lr=0.01) for m in (whole, model))
    train(whole, a, batches())
    train(model, b, batches(), share_of(rank, world))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    anchors = [torch.zeros_like(p) for p in whole.parameters()]
    a.set_anchors(anchors)
    b.set_anchors(anchors)
    train(whole, a, batches())
    train(model, b, batches(), share_of(rank, world))
    assert_same(model, whole)


def codes_are_refused(rank: int, world: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        fast.AdamW(sharded_network(world).parameters(), state_dtype=torch.uint8)


def ddp(rank: int, world: int, folder: Path) -> None:
    """Gradients that are views of DDP's buckets, at any alignment."""
    whole, inner = network(), network()
    model = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=True)
    keys: dict[str, Any] = {"lr": 0.01, "max_grad_norm": 0.05}
    train(whole, fast.AdamW(groups(whole), **keys), batches())
    train(model, fast.AdamW(groups(inner), **keys), batches(), share_of(rank, world))
    assert any(p.grad.storage_offset() for p in inner.parameters())
    assert_same(inner, whole)


def scaler(rank: int, world: int, folder: Path) -> None:
    """An overflow on one rank is skipped on all."""
    model = sharded_network(world)
    opt = fast.AdamW(groups(model), lr=0.01, max_grad_norm=1.0)
    scaling = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        before = [p.to_local().clone() for p in model.parameters()]
        opt.zero_grad()
        scaling.scale(model(batches()[0][share_of(rank, world)]).square().mean()).backward()
        weight = next(iter(model.parameters()))
        if overflow and rank == 0:
            weight.grad.to_local().view(-1)[0] = torch.inf
        scaling.step(opt)
        scaling.update()
        now = [p.to_local() for p in model.parameters() if p.to_local().numel()]
        was = [w for w in before if w.numel()]
        same = [torch.equal(a, b) for a, b in zip(now, was, strict=True)]
        assert all(same) if overflow else not any(same)
    assert {float(s["step"]) for s in opt.state.values()} == {2.0}
    assert scaling.get_scale() == 2.0


ALL = (
    fsdp,
    fsdp_sgd,
    unfused,
    clip_in_double,
    card,
    average,
    checkpoint,
    whole_into_sharded,
    codes_are_refused,
    ddp,
    scaler,
)
CASES: dict[str, Callable[[int, int, Path], None]] = {case.__name__: case for case in ALL}

if __name__ == "__main__":
    name, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    CASES[name](rank, world, folder)
    dist.barrier()  # a rank that leaves early aborts the other inside gloo
    dist.destroy_process_group()
