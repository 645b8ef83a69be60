"""The anchored updates on the CPU: csrc/cpu/anchored.cpp."""

from __future__ import annotations

from typing import Any

import torch

from fastkernels.backends import native
from fastkernels.ops.update.call import UpdateCall
from fastkernels.ops.update.plan import Plans, rows_of


def _build(call: UpdateCall) -> Any:
    rows = torch.tensor(rows_of(call), dtype=torch.int64, device="cpu")
    return native.module().AnchoredPlan(rows.data_ptr(), len(rows))


PLANS = Plans(_build)


def run(call: UpdateCall) -> None:
    """Step `call` with the compiled kernel."""
    plan, call, grads, finish = PLANS.find(call)
    if call.found_inf is not None and float(call.found_inf) != 0:
        return
    getattr(plan, call.rule.name)(
        grads,
        call.hyper.data_ptr(),
        0 if call.stats is None else call.stats.data_ptr(),
        None if call.grad_scale is None else float(call.grad_scale),
        call.max_grad_norm or 0.0,
        call.seed,
        torch.get_num_threads(),
    )
    finish()
