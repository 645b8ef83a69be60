"""The anchored updates in CUDA C++ (csrc/cuda/anchored.cu): one update launch for any list.

Two when there are float64 parameters among others. Gradients' addresses come as kernel arguments,
so a captured graph has them without pinned memory.
"""

from __future__ import annotations

import torch

from fastkernels import _cuda, _update_tables
from fastkernels._update import Batch, addresses
from fastkernels._update_tables import Plan

_DOUBLE = 2  # csrc's Dtype::f64


def kind_of(types: bytes, remainder: bool, aligned: bool) -> str:
    """Of a row: all else is decided in the kernel."""
    return "double" if types[0] == _DOUBLE else "float"


def _upload(plan: Plan, grads: list[int], device: int, stream: int) -> None:
    capturing = torch.cuda.is_current_stream_capturing()
    if grads == plan.uploaded and not capturing:
        return
    _cuda.module().write_addresses(device, stream, plan.grads.data_ptr(), grads)
    if capturing:
        # Every replay writes the table: what it holds afterwards is not known here.
        _update_tables.keep_for_graphs(plan)
        plan.replayed = True
    plan.uploaded = [] if plan.replayed else grads


def run(batch: Batch, rule: str) -> None:
    """Step `batch` by `rule` ("adamw", "sgd")."""
    what = kind_of, batch.seed, batch.max_grad_norm
    plan, batch, grads, write_back = _update_tables.PLANS.find(batch, *what)
    device = batch.params[0].device
    index = device.index if device.index is not None else torch.cuda.current_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    grad_scale = _update_tables.flag(batch.grad_scale, device)
    found_inf = _update_tables.flag(batch.found_inf, device)
    if found_inf is not None:
        found_inf = found_inf.float()
    wide_scale = grad_scale is not None and grad_scale.dtype == torch.float64
    hyper = batch.hyper.to(device)
    floats = sum(launch.count for launch in plan.launches if launch.kind == "float")
    with torch.cuda.device(device):
        _upload(plan, grads, index, stream)
        getattr(_cuda.module(), rule)(
            index, stream, plan.rows.data_ptr(), plan.grads.data_ptr(), plan.chunks.data_ptr(),
            len(batch.params), sum(launch.count for launch in plan.launches), floats,
            hyper.data_ptr(), plan.partial.data_ptr(), plan.control.data_ptr(),
            *addresses((batch.stats, grad_scale, found_inf)), wide_scale,
            batch.max_grad_norm or 0.0, batch.seed,
        )  # fmt: skip
    write_back()
    # The kernels write behind autograd's back: a graph that saved a parameter must notice.
    torch.autograd.graph.increment_version(batch.params)
