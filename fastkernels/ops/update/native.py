"""The anchored updates on the CPU: csrc/cpu/anchored.cpp."""

from __future__ import annotations

from typing import Any

import torch

from fastkernels.backends import native
from fastkernels.ops.update.batch import Batch
from fastkernels.ops.update.plan import Plans, rows_of


def _build(batch: Batch) -> Any:
    rows = torch.tensor(rows_of(batch), dtype=torch.int64, device="cpu")
    return native.module().AnchoredPlan(rows.data_ptr(), len(rows))


PLANS = Plans(_build)


def run(batch: Batch) -> None:
    """Step `batch` with the compiled kernel."""
    plan, batch, grads, write_back = PLANS.find(batch)
    if batch.found_inf is not None and float(batch.found_inf) != 0:
        return
    getattr(plan, batch.rule.name)(
        grads,
        batch.hyper.data_ptr(),
        0 if batch.stats is None else batch.stats.data_ptr(),
        None if batch.grad_scale is None else float(batch.grad_scale),
        batch.max_grad_norm or 0.0,
        batch.seed,
        torch.get_num_threads(),
    )
    write_back()
    # The kernel writes behind autograd's back: a graph that saved a parameter must notice.
    torch.autograd.graph.increment_version(batch.params)
