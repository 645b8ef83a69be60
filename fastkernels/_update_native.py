"""The anchored updates on the CPU: tensors to addresses, with the tables kept between steps."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from fastkernels import _checks, _native
from fastkernels._update import Batch, Optionals

_CODES = {
    torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4, torch.uint8: 5,
}  # fmt: skip

# Plans by (rule, addresses of the parameters); a plan is tables only and holds no tensor. A stalled
# and a full list, for a few optimizers.
_plans: OrderedDict[tuple[Any, ...], tuple[list[Any], Any]] = OrderedDict()
_MAX_PLANS = 16

_data_ptr, _stride, _size = Tensor.data_ptr, Tensor.stride, Tensor.size


def _addresses(tensors: Optionals) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _layout(batch: Batch) -> list[Any]:
    """Everything a plan depends on; compared at every step (1.1 ms for 2000 tensors)."""
    params, grads = batch.params, batch.grads
    strides, shapes = list(map(_stride, params)), list(map(_size, params))
    return [
        strides == list(map(_stride, grads)) and shapes == list(map(_size, grads)),
        strides,
        shapes,
        batch.groups,
        [g.dtype for g in grads],
        [list(map(_data_ptr, m)) for m in batch.moments],
        [list(map(_data_ptr, s)) for s in batch.moment_scales],
        list(map(_data_ptr, batch.steps)),
        _addresses(batch.anchors),
        _addresses(batch.curvature),
        _addresses(batch.curvature_scales),
        list(map(_data_ptr, batch.remainders)),
    ]


def _types(batch: Batch) -> bytes:
    none = torch.empty(0)
    codes = bytearray()
    for i, p in enumerate(batch.params):
        second = batch.moments[1][i] if len(batch.moments) > 1 else none
        row = (p, batch.grads[i], batch.moments[0][i], second)
        optional = (batch.anchors and batch.anchors[i], batch.curvature and batch.curvature[i])
        for t in (*row, *optional):
            empty = not isinstance(t, Tensor) or (t.numel() == 0 and p.numel() > 0)
            codes.append(0 if empty else _CODES[t.dtype])
    return bytes(codes)


def _build(batch: Batch, layout: list[Any]) -> Any:
    *_, moments, scales, steps, anchors, curvature, curvature_scales, remainders = layout
    return _native.module().AnchoredPlan(
        [p.numel() for p in batch.params], list(batch.groups), _types(batch),
        list(map(_data_ptr, batch.params)), moments, [s for s in scales if s], steps, anchors,
        curvature, curvature_scales, remainders,
    )  # fmt: skip


def run(batch: Batch, rule: str) -> None:
    """Step `batch` by `rule` ("adamw", "sgd") with the compiled kernel."""
    key = (rule, tuple(map(_data_ptr, batch.params)))
    layout = _layout(batch)
    known = _plans.get(key)
    # A plan is there only for lists that were checked and in which nothing had to be copied.
    if known is not None and known[0] == layout and layout[0]:
        _call(batch, known[1], rule)
        return
    aligned = _checks.align(batch)
    layout = _layout(aligned)
    plan = _build(aligned, layout)
    if not aligned.copies:
        _plans[key] = (layout, plan)
        while len(_plans) > _MAX_PLANS:
            _plans.popitem(last=False)
    _call(aligned, plan, rule)
    _checks.write_back(aligned)


def _call(batch: Batch, plan: Any, rule: str) -> None:
    if batch.found_inf is not None and float(batch.found_inf) != 0:
        return
    getattr(plan, rule)(
        list(map(_data_ptr, batch.grads)),
        batch.hyper.data_ptr(),
        0 if batch.stats is None else batch.stats.data_ptr(),
        None if batch.grad_scale is None else float(batch.grad_scale),
        batch.max_grad_norm or 0.0,
        batch.seed,
        torch.get_num_threads(),
    )
    # The kernel writes behind autograd's back: a graph that saved a parameter must notice.
    torch.autograd.graph.increment_version(batch.params)
