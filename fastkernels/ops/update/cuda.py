"""The anchored updates in CUDA C++ (csrc/cuda): one update launch for each kind of tensor.

A kind is a combination of dtypes that a kernel was compiled for (csrc/cuda/kinds.cuh), or any row
of float or of double arithmetic. The gradients' addresses come as kernel arguments, so a captured
graph has them without pinned memory.
"""

from __future__ import annotations

import functools

import torch

from fastkernels.backends import cuda
from fastkernels.ops.update.call import UpdateCall
from fastkernels.ops.update.device_plan import DEVICE_PLANS, DevicePlan, flag, keep_for_graphs
from fastkernels.ops.update.plan import DTYPES
from fastkernels.ops.update.signature import addresses


@functools.cache
def _kinds() -> dict[tuple[bytes, bool], int]:
    return dict(cuda.module().kinds())


def kind_of(types: bytes, remainder: bool, is_aligned: bool) -> int:
    """The number of a row's kernel."""
    param, grad, first, second, anchor, curvature = types
    if DTYPES[param] == torch.float64:
        return int(cuda.module().ANY_DOUBLE)
    # Without an anchor there is nothing for the curvature to weigh.
    key = bytes((param, grad, first, anchor, curvature if anchor else 0)), remainder
    if is_aligned and second in (0, first) and key in _kinds():
        return _kinds()[key]
    return int(cuda.module().ANY_FLOAT)


def _upload(plan: DevicePlan, grads: list[int], device: int, stream: int) -> None:
    capturing = torch.cuda.is_current_stream_capturing()
    if grads == plan.contents and not capturing:
        return
    cuda.module().write_addresses(device, stream, plan.grads.data_ptr(), grads)
    if capturing:
        # Every replay writes the table: what it holds afterwards is not known here.
        keep_for_graphs(plan)
        plan.in_graph = True
    plan.contents = [] if plan.in_graph else grads


def run(call: UpdateCall) -> None:
    """Step `call` with the compiled kernels."""
    what = kind_of, call.seed, call.max_grad_norm
    plan, call, grads, finish = DEVICE_PLANS.find(call, *what)
    device = call.params[0].device
    index = device.index if device.index is not None else torch.cuda.current_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    grad_scale = flag(call.grad_scale, device)
    found_inf = flag(call.found_inf, device)
    if found_inf is not None:
        found_inf = found_inf.float()
    wide_scale = grad_scale is not None and grad_scale.dtype == torch.float64
    hyper = call.hyper.to(device)
    launches = [(launch.kind, launch.first, launch.count) for launch in plan.launches]
    with torch.cuda.device(device):
        _upload(plan, grads, index, stream)
        getattr(cuda.module(), call.rule.name)(
            index, stream, plan.rows.data_ptr(), plan.grads.data_ptr(), plan.chunks.data_ptr(),
            len(call.params), launches, hyper.data_ptr(), plan.partial.data_ptr(),
            plan.control.data_ptr(), *addresses((call.stats, grad_scale, found_inf)), wide_scale,
            call.max_grad_norm or 0.0, call.seed,
        )  # fmt: skip
    finish()
