"""`fast synthetic`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import fast
from fast.adapt.defaults import own_beside_synthetic
from fast.cli.spec import SyntheticSpec
from fast.cli.task.load import load_task
from fast.data.dataset import as_data
from fast.errors import printable
from fast.files import atomic_file, check_writable_file
from fast.models.device import pick_device


def run(spec: SyntheticSpec) -> int:
    path = Path(spec.output)
    check_writable_file(path, "--output")
    task = load_task(spec.task, measured=False)
    data = as_data(task.train, "data")
    number = task.sizes["train"]
    own = own_beside_synthetic(spec.count, number) if spec.own is None else spec.own
    # Folders are sorted by class.
    rows = torch.randperm(number, generator=torch.Generator().manual_seed(spec.seed))
    start, _ = data.batch_at(rows[: max(spec.count, own)])
    model = task.loaded.model.to(pick_device(spec.device))
    options = {"steps": spec.steps, "batch_size": spec.batch_size, "seed": spec.seed}
    inputs = fast.synthetic_inputs(model, start, count=spec.count, own=own, **options).cpu()
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, x=inputs.numpy())
    print(f"{len(inputs)} inputs in {printable(path)}: pass them as --source-inputs")
    return 0
