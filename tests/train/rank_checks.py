"""Runs on several processes, and what their weights are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import fast
from torchrun import torchrun

Weights = dict[str, torch.Tensor]


def on_ranks(number: int, names: Sequence[str], folder: Path) -> dict[str, list[Weights]]:
    """The weights and statistics that each of `number` processes ends with, by name of the run."""
    torchrun(number, "rank_runs", "|".join(names), str(folder))
    files = {n: [folder / f"{n} {rank}.pt" for rank in range(number)] for n in names}
    return {n: [torch.load(f, weights_only=True) for f in files[n]] for n in names}


def furthest(a: Weights, b: Weights) -> float:
    assert list(a) == list(b)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def check(ranks: list[Weights], alone: fast.Result, most: float = 1e-8) -> None:
    """The ranks have the same weights, and those of one process to rounding."""
    first, *others = ranks
    for other in others:
        assert furthest(first, other) == 0
    assert furthest(first, alone.model.state_dict()) <= most
