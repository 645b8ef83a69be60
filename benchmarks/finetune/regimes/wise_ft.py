"""WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): the line between two ends of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.finetune.regimes.samples import Task
from fast.data.trees import pick
from fast.heads import estimate_statistics

# Points before the last, which the run itself has measured. They are close where little is lost.
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
# Statistics of norms that are kept per task belong to the weights, and are estimated anew for each
# point of the line.
STATISTICS_BATCHES, STATISTICS_SIZE = 4, 128
Point = tuple[float, float, float]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that a run trains, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def line(task: Task, start: Mapping[str, Tensor], accuracies: tuple[float, float]) -> list[Point]:
    """(alpha, target accuracy, source accuracy) on the way from `start` to the end of a run.

    Args:
        task: whose model is at the end; it is left at an inner point.
        start: the parameters at alpha 0.
        accuracies: target and source accuracy at the end, alpha 1.
    """
    model, (inputs, labels) = task.model, task.train
    end = {name: p.detach().clone() for name, p in model.named_parameters() if name in start}
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    batches = [pick(inputs, part) for part in rows.split(STATISTICS_SIZE)[:STATISTICS_BATCHES]]
    points = []
    for alpha in ALPHAS:
        for name, p in model.named_parameters():
            if name in end:
                p.copy_(torch.lerp(start[name], end[name], alpha))
        estimate_statistics(model, batches)
        points.append((alpha, task.target_accuracy(model), task.source_accuracy(model)))
    return [*points, (1.0, *accuracies)]


def best_target(points: Sequence[Point], source: float) -> float | None:
    """The best target accuracy on a line, linear between its points, where the source accuracy is
    at least `source`; None where it is nowhere.

    Args:
        points: (alpha, target accuracy, source accuracy), by alpha.
    """
    targets = [t for _, t, s in points if s >= source]
    for (_, t0, s0), (_, t1, s1) in pairwise(points):
        if (s0 >= source) != (s1 >= source):
            targets.append(t0 + (t1 - t0) * (source - s0) / (s1 - s0))
    return max(targets, default=None)
