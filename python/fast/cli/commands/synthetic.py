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


def run(spec: SyntheticSpec) -> int:
    path = Path(spec.output)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: is a folder, or in none that exists; name another file")
    task = load_task(spec.task, measured=False)
    data = as_data(task.train, "data")
    start, _ = data.batch_at(torch.arange(min(spec.count, data.num_samples or spec.count)))
    model = task.loaded.model.to(pick_device(spec.device))
    inputs = fast.synthetic_inputs(
        model, start, count=spec.count, steps=spec.steps, seed=spec.seed
    ).cpu()
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, x=inputs.numpy())
    print(f"{len(inputs)} inputs in {printable(path)}: pass them as --source-inputs")
    return 0
