"""`fast synthetic`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import fast
from fast.cli.spec import SyntheticSpec
from fast.cli.task.load import load_task
from fast.data.dataset import as_data
from fast.errors import printable
from fast.files import atomic_file
from fast.models.device import pick_device

# Training inputs whose shape, range, mean and deviation the synthetic ones take.
LIKE = 64


def run(spec: SyntheticSpec) -> int:
    path = Path(spec.output)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: is a folder, or in none that exists; name another file")
    task = load_task(spec.task, measured=False)
    data = as_data(task.train, "data")
    like, _ = data.batch_at(torch.arange(min(LIKE, data.num_samples or LIKE)))
    model = task.loaded.model.to(pick_device(spec.device))
    inputs = fast.synthetic_inputs(
        model, like, count=spec.count, steps=spec.steps, seed=spec.seed
    ).cpu()
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, x=inputs.numpy())
    print(f"{len(inputs)} inputs in {printable(path)}: pass them as --source-inputs")
    return 0
