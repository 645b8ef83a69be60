"""Runs on every rank: `python -m rank_runs NAME FOLDER` (test_ranks); not collected itself."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fast
from fast.ranks import joined

STEPS = 30
SOURCE, SPLIT = {"source_inputs": True}, {"eval_every": 10}
RUNS: dict[str, dict[str, Any]] = {
    "fast": {},
    "source inputs": SOURCE,
    "budget": {**SOURCE, "forget_budget": 0.002},
    "vanilla": {"method": "vanilla", "max_entropy": False},
    "ewc": {**SOURCE, "method": "ewc"},
    "replay": {**SOURCE, "method": "replay"},
    "micro-batches": {**SOURCE, "grad_accum_steps": 2},
    "distillation": {"distill": 0.2, "rehearse": 0.0},
    "class weights": {"class_weights": (1.0, 2.0, 0.5), "label_smoothing": 0.1},
    "per_task": {**SOURCE, "batch_norm": "per_task"},
}


def network(norms: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(24) if norms else nn.LayerNorm(24)
    model = nn.Sequential(nn.Linear(16, 24), norm, nn.GELU(), nn.Linear(24, 24), nn.GELU())
    return model.append(nn.Linear(24, 10)).double()


def samples(count: int, seed: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    return x, (x[:, :2] > 0).sum(1).remainder(classes)


def run(name: str, **options: Any) -> fast.Result:
    """One of `RUNS` by `fast.finetune`, on one process or inside a group."""
    options = {**RUNS[name], **options}
    if options.pop("source_inputs", False):
        options["source_inputs"] = samples(96, 2, 3)
    return fast.finetune(
        network(norms=name == "per_task"),
        samples(256, 1, 3),
        val=samples(101, 3, 3),
        steps=STEPS,
        batch_size=32,
        lr=3e-2,
        progress=False,
        **options,
    )


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    torch.set_num_threads(1)
    with joined() as ranks:
        result = run(name)
        torch.save(result.model.state_dict(), Path(folder) / f"{ranks.rank}.pt")
        print(ranks.rank, result.history[-1])
