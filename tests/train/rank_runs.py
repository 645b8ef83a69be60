"""Runs on every rank: `python -m rank_runs NAMES FOLDER`; not collected itself.

NAMES are of `RUNS`, or `own loop`, with `|` between them; one that ends in `SHARDED` is sharded.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import fast
import torchvision_ops
from fast.ranks import AUTO, Ranks, joined

torchvision_ops.declare()  # PEFT imports torchvision

STEPS = 30


def halved(inputs: torch.Tensor) -> torch.Tensor:
    return inputs / 2


SOURCE = {"source_inputs": True}
RUNS: dict[str, dict[str, Any]] = {
    "fast": {},
    "source inputs": SOURCE,
    "budget": {**SOURCE, "forget_budget": 0.002},
    "vanilla": {"method": "vanilla", "max_entropy": False},
    "ewc": {**SOURCE, "method": "ewc"},
    "replay": {**SOURCE, "method": "replay"},
    # Each of four sharded processes needs a source sample in each micro-batch.
    "micro-batches": {**SOURCE, "grad_accum_steps": 2, "batch_size": 64},
    "distillation": {"distill": 0.2, "rehearse": 0.0},
    "class weights": {"class_weights": (1.0, 2.0, 0.5), "label_smoothing": 0.1},
    "per_task": {**SOURCE, "batch_norm": "per_task"},
    "adapter": {"method": "adapter"},
    "sgd": {**SOURCE, "optimizer": "sgd", "max_grad_norm": 0.1},
    "kept head": {**SOURCE, "head": "keep", "distill": 0.2},
    "augmented": {"distill": 0.2, "transform": halved},
    "patience": {"patience": 1},
    "own loop": SOURCE,
    "unwrapped": SOURCE,
    "dropout": {**SOURCE, "dropout": True},
    "broken": {},
}


KILLED_AT = 17
SHARDED = ", sharded"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(24) if name == "per_task" else nn.LayerNorm(24)
    extra = nn.Dropout(0.2 if name == "dropout" else 0.0)
    model = nn.Sequential(nn.Linear(16, 24), norm, nn.GELU(), nn.Linear(24, 24), extra)
    return model.append(nn.Linear(24, 10)).double()


def samples(count: int, seed: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    return x, (x[:, :2] > 0).sum(1).remainder(classes)


def run(name: str, **options: Any) -> fast.Result:
    """One of `RUNS` by `fast.finetune`, on one process or inside a group."""
    options = {"batch_size": 32, **RUNS[name], **options}
    if options.pop("source_inputs", False):
        options["source_inputs"] = samples(96, 2, 3)
    return fast.finetune(
        network(name),
        Broken() if name == "broken" else samples(256, 1, 3),
        val=samples(101, 3, 3),
        steps=STEPS,
        lr=3e-2,
        eval_every=10,
        progress=False,
        **options,
    )


class Broken(Dataset):
    """One row of it cannot be read by the second process, once the run is under way."""

    row = 7

    def __init__(self) -> None:
        self.samples, self.targets = samples(256, 1, 3)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        self.reads += i == self.row
        if i == self.row and self.reads > 1 and Ranks(AUTO).rank == 1:
            raise OSError("disk")
        return self.samples[i], int(self.targets[i])


def own_loop(shard: bool = False, wrapped: bool = True) -> fast.Adaptation:
    """A loop that knows of its ranks by `DistributedDataParallel` only, or forgets it."""
    model = network("own loop")
    adaptation = fast.Adaptation(
        model,
        samples(256, 1, 3),
        source_inputs=samples(96, 2, 3),
        steps=STEPS,
        batch_size=32,
        lr=3e-2,
        shard=shard,
    )
    optimizer, scheduler = adaptation.optimizer, adaptation.scheduler()
    wraps = Ranks(AUTO).size > 1 and not shard and wrapped
    parallel = DistributedDataParallel(model) if wraps else model
    parallel.train()
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows, model=parallel)
        (F.cross_entropy(logits, labels) + penalty).backward()
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
    adaptation.finish()
    return adaptation


def send_later(rank: int, number: int) -> None:
    """The second process gets a signal at the end of a step."""
    after_step = fast.Adaptation._after_step

    def killed(self: fast.Adaptation, *args: Any) -> None:
        after_step(self, *args)
        if self.done == KILLED_AT and rank == 1:
            os.kill(os.getpid(), number)

    fast.Adaptation._after_step = killed  # type: ignore[method-assign]


def main(names: str, folder: str, place: str = "") -> None:
    torch.set_num_threads(1)
    how, _, path = place.partition("=")
    options: dict[str, Any] = {}
    if path:
        options = {"save_every": 20 if how == "stop" else 1}
        options["resume" if how == "resume" else "output"] = path
    with joined() as ranks:
        if how in SIGNALS:
            send_later(ranks.rank, SIGNALS[how])
        for given in names.split("|"):
            name, shard = given.removesuffix(SHARDED), given.endswith(SHARDED)
            if name in ("own loop", "unwrapped"):
                model = own_loop(shard, name == "own loop").model
            else:
                model = run(name, shard=shard, **options).model
            torch.save(model.state_dict(), Path(folder) / f"{given} {ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
