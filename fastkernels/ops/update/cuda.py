"""The anchored updates in CUDA C++ (csrc/cuda/anchored.cu): one update launch for any list.

There are two when the list has float64 parameters among others. The gradients' addresses come as
kernel arguments, so a captured graph has them without pinned memory.
"""

from __future__ import annotations

import torch

from fastkernels.backends import cuda
from fastkernels.ops.update.batch import Batch
from fastkernels.ops.update.plan import (
    DEVICE_PLANS,
    DTYPES,
    DevicePlan,
    addresses,
    flag,
    keep_for_graphs,
)


def kind_of(types: bytes, remainder: bool, aligned: bool) -> str:
    """The arithmetic of a row; all else is decided in the kernel."""
    return "double" if DTYPES[types[0]] == torch.float64 else "float"


def _upload(plan: DevicePlan, grads: list[int], device: int, stream: int) -> None:
    capturing = torch.cuda.is_current_stream_capturing()
    if grads == plan.uploaded and not capturing:
        return
    cuda.module().write_addresses(device, stream, plan.grads.data_ptr(), grads)
    if capturing:
        # Every replay writes the table: what it holds afterwards is not known here.
        keep_for_graphs(plan)
        plan.replayed = True
    plan.uploaded = [] if plan.replayed else grads


def run(batch: Batch) -> None:
    """Step `batch` with the compiled kernels."""
    what = kind_of, batch.seed, batch.max_grad_norm
    plan, batch, grads, write_back = DEVICE_PLANS.find(batch, *what)
    device = batch.params[0].device
    index = device.index if device.index is not None else torch.cuda.current_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    grad_scale = flag(batch.grad_scale, device)
    found_inf = flag(batch.found_inf, device)
    if found_inf is not None:
        found_inf = found_inf.float()
    wide_scale = grad_scale is not None and grad_scale.dtype == torch.float64
    hyper = batch.hyper.to(device)
    floats = sum(launch.count for launch in plan.launches if launch.kind == "float")
    with torch.cuda.device(device):
        _upload(plan, grads, index, stream)
        getattr(cuda.module(), batch.rule.name)(
            index, stream, plan.rows.data_ptr(), plan.grads.data_ptr(), plan.chunks.data_ptr(),
            len(batch.params), sum(launch.count for launch in plan.launches), floats,
            hyper.data_ptr(), plan.partial.data_ptr(), plan.control.data_ptr(),
            *addresses((batch.stats, grad_scale, found_inf)), wide_scale,
            batch.max_grad_norm or 0.0, batch.seed,
        )  # fmt: skip
    write_back()
    # The kernels write behind autograd's back: a graph that saved a parameter must notice.
    torch.autograd.graph.increment_version(batch.params)
