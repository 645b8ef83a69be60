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

# Plans by (rule, addresses of the parameters and of the first step count: two optimizers may share
# parameters); a plan is tables only and holds no tensor. A stalled and a full list, for a few.
_plans: OrderedDict[tuple[Any, ...], tuple[list[Any], Any]] = OrderedDict()
# Stepping in the backward pass takes an optimizer per tensor.
MAX_PLANS = 4096

_data_ptr, _numel, _is_contiguous = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous


def _addresses(tensors: Optionals) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _fits(batch: Batch, layout: list[Any]) -> bool:
    """Whether the gradients can be read in the parameters' order; run at every step, so cheap."""
    grads, (numels, strides, *_) = batch.grads, layout
    if numels != list(map(_numel, grads)) or not all(g.is_cpu for g in grads):
        return False
    if not strides and all(map(_is_contiguous, grads)):
        return True
    return all(
        g.layout == torch.strided and p.shape == g.shape and _checks.same_layout(p, g)
        for p, g in zip(batch.params, grads, strict=True)
    )


def _dtypes(tensors: Optionals) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def layout_of(batch: Batch) -> list[Any]:
    """Everything a plan depends on; compared at every step, so no tuple per tensor: the garbage
    collector makes those dear. Dtypes too: memory may be given to another tensor."""
    return [
        list(map(_numel, batch.params)),
        [p.stride() for p in batch.params if not p.is_contiguous()],
        batch.groups,
        _dtypes(batch.params),
        _dtypes(batch.grads),
        [list(map(_data_ptr, m)) for m in batch.moments],
        [_dtypes(m) for m in batch.moments],
        [list(map(_data_ptr, s)) for s in batch.moment_scales],
        list(map(_data_ptr, batch.steps)),
        _addresses(batch.anchors),
        _dtypes(batch.anchors),
        _addresses(batch.curvature),
        _dtypes(batch.curvature),
        _addresses(batch.curvature_scales),
        list(map(_data_ptr, batch.remainders)),
    ]


def _types(batch: Batch) -> bytes:
    none = torch.empty(0)
    codes = bytearray()
    for i, p in enumerate(batch.params):
        second = batch.moments[1][i] if len(batch.moments) > 1 else none
        row = (p, batch.grads[i], batch.moments[0][i], second)
        anchor = batch.anchors[i] if batch.anchors else None
        curvature = batch.curvature[i] if batch.curvature else None
        for t in (*row, anchor, curvature):
            codes.append(0 if t is None or t.numel() == 0 else _CODES[t.dtype])
    return bytes(codes)


def _build(batch: Batch) -> Any:
    return _native.module().AnchoredPlan(
        list(map(_numel, batch.params)),
        list(batch.groups),
        _types(batch),
        list(map(_data_ptr, batch.params)),
        [list(map(_data_ptr, m)) for m in batch.moments],
        [list(map(_data_ptr, s)) for s in batch.moment_scales],
        list(map(_data_ptr, batch.steps)),
        _addresses(batch.anchors),
        _addresses(batch.curvature),
        _addresses(batch.curvature_scales),
        list(map(_data_ptr, batch.remainders)),
    )


def run(batch: Batch, rule: str) -> None:
    """Step `batch` by `rule` ("adamw", "sgd") with the compiled kernel."""
    key = (rule, batch.steps[0].data_ptr(), tuple(map(_data_ptr, batch.params)))
    layout = layout_of(batch)
    known = _plans.get(key)
    # Plans are kept only for lists that were checked and in which nothing but gradients was copied.
    if known is not None and known[0] == layout and _fits(batch, layout):
        _plans.move_to_end(key)
        _call(batch, known[1], rule)
        return
    prepared, write_back = _checks.prepare(batch)
    prepared_layout = layout_of(prepared)
    plan = _build(prepared)
    if prepared_layout == layout:
        _plans[key] = (layout, plan)
        while len(_plans) > MAX_PLANS:
            _plans.popitem(last=False)
    _call(prepared, plan, rule)
    write_back()


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
