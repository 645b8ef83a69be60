"""One row of the table: a method on a pair, in a regime, at a length, with so many samples."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Record, machine
from benchmarks.finetune.regimes.baselines import RUNNERS
from benchmarks.finetune.regimes.methods import METHODS
from benchmarks.finetune.regimes.samples import Task

# The lengths of the table are those of a pair that is usually trained for so many steps; one that
# is usually trained for fewer takes the same share of them.
USUAL_STEPS = 150
HALF_STEPS = USUAL_STEPS // 2


def run(
    *,
    pair: str,
    method: str,
    regime: str,
    source_inputs: bool,
    steps: int,
    samples: int | None,
    lr: float | None,
    seed: int,
    data: Path,
    networks: Path | None = None,
) -> Record:
    """One run: accuracies, its history, and the CPU time of the whole call, measurements included.

    Args:
        regime, source_inputs: see `methods`.
        steps: 75, 150, 400 or 1,500, see `USUAL_STEPS`.
        samples: of each class, or None for all.
    """
    torch.manual_seed(seed)
    task, how = Task(pair, data, networks, samples=samples, seed=seed), METHODS[method]
    options: dict[str, Any] = dict(how.options)
    if lr is not None:
        options["lr"] = lr
    if source_inputs:
        options["source_inputs"] = task.real.source_inputs
    start = time.process_time()
    record = RUNNERS[how.runner](
        task,
        steps=round(task.real.steps * steps / USUAL_STEPS),
        **how.norms(regime),
        **options,
    )
    seconds = round(time.process_time() - start, 1)
    return record | {"cpu_seconds": seconds, "machine": machine()}
