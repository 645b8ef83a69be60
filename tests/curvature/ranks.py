"""What each of two processes does; in a module of its own, so that a new process can import it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from curvature.cases import build
from fast.curvature import GGN, Hessian

KINDS = {"hessian": Hessian, "ggn": GGN}
# Samples per rank: uneven, and a rank whose labels are all ignored.
SPLITS = {"uneven": (4, False), "ignored": (3, True)}


def data_of(split: str):
    model, x, y = build("mlp-tanh")
    first, ignored = SPLITS[split]
    if ignored:
        y[first:] = -100
    return model, x, y, first


def rank_main(rank: int, folder: str, split: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, y, first = data_of(split)
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
        out[f"{name} check"] = str(operator.check())
    Path(folder, f"{rank}.json").write_text(json.dumps(out))
    dist.barrier()  # a rank that leaves early aborts the other inside gloo
    dist.destroy_process_group()
