"""The anchored updates on the CPU: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkernels import _native
from fastkernels._plans import Plans
from fastkernels._update import Batch, addresses, dtype_codes


def _build(batch: Batch) -> Any:
    return _native.module().AnchoredPlan(
        list(map(Tensor.numel, batch.params)),
        list(batch.groups),
        dtype_codes(batch),
        addresses(batch.params),
        list(map(addresses, batch.moments)),
        list(map(addresses, batch.moment_scales)),
        addresses(batch.steps),
        addresses(batch.anchors),
        addresses(batch.curvature),
        addresses(batch.curvature_scales),
        addresses(batch.remainders),
    )


_plans = Plans(_build)


def run(batch: Batch, rule: str) -> None:
    """Step `batch` by `rule` ("adamw", "sgd") with the compiled kernel."""
    plan, batch, grads, write_back = _plans.find(batch)
    if batch.found_inf is not None and float(batch.found_inf) != 0:
        return
    getattr(plan, rule)(
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
