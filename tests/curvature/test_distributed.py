"""Two processes, each with its own part of the data, get the product over all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from curvature_cases import build
from fast.curvature import GGN, Hessian

KINDS = {"hessian": Hessian, "ggn": GGN}
# Samples per rank: uneven, and a rank whose labels are all ignored.
SPLITS = {"uneven": (4, False), "ignored": (3, True)}


def _data(split: str):
    model, x, y = build("mlp-tanh")
    first, ignored = SPLITS[split]
    if ignored:
        y[first:] = -100
    return model, x, y, first


def _rank(rank: int, folder: str, split: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, y, first = _data(split)
    part = slice(0, first) if rank == 0 else slice(first, None)
    out = {}
    for name, kind in KINDS.items():
        operator = kind(
            model, F.cross_entropy, [(x[part], y[part])], process_group=dist.group.WORLD
        )
        V = torch.arange(3 * operator.shape[0], dtype=x.dtype).view(-1, 3).sin()
        out[name] = [
            (operator @ V).tolist(),
            operator.quad(V).tolist(),
            operator.gradient().tolist(),
            operator.top(2).values.tolist(),
        ]
    Path(folder, f"{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks(tmp_path: Path, split: str) -> None:
    mp.spawn(_rank, (str(tmp_path), split), nprocs=2)
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second
    model, x, y, _ = _data(split)
    for name, kind in KINDS.items():
        operator = kind(model, F.cross_entropy, (x, y))
        V = torch.arange(3 * operator.shape[0], dtype=x.dtype).view(-1, 3).sin()
        product, quad, gradient, values = (torch.tensor(t).double() for t in first[name])
        torch.testing.assert_close(product, operator @ V, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(quad, operator.quad(V), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(gradient, operator.gradient(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(values, operator.top(2).values, rtol=1e-5, atol=1e-8)
