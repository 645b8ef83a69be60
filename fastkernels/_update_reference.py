"""The reference of the anchored updates, but for the rule itself.

A rule (AdamW, SGD) says how one tensor moves; this is the job around it: gradient scale, clipping,
the pull to the anchor, compact storage, the norms, and a non-finite step that changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels import _checks, _storage
from fastkernels._update import Batch, compute_dtype

# csrc's kHardest: a pull beyond it leaves nothing of w. It is finite, so that a curvature of 0
# takes it away.
HARDEST = 1e30

# (row of hyper, step [], w, g, *moments or None) -> (new w, *new moments), flat, compute dtype
Rule = Callable[..., tuple[Any, ...]]


def _entry(tensors: Sequence[Any], i: int) -> Any:
    """Entry i of an optional list: None when the list is off or the entry is empty."""
    t = tensors[i] if tensors else None
    return None if t is None or t.numel() == 0 else t


def run(batch: Batch, rule: Rule) -> None:
    """Apply `rule` to every tensor of `batch`, in place."""
    batch, write_back = _checks.prepare(batch)
    device = batch.params[0].device
    columns = batch.op.hyper
    scale = torch.ones((), dtype=torch.float64, device=device)
    if batch.grad_scale is not None:
        scale = scale / batch.grad_scale.to(device).double().reshape(())
    squares = torch.zeros(4, dtype=torch.float64, device=device)
    for g in batch.grads:
        squares[0] += (g.double() * scale).square().sum()
    skip = torch.zeros((), dtype=torch.bool, device=device)
    if batch.found_inf is not None:
        skip = batch.found_inf.to(device).reshape(()) != 0
    if batch.max_grad_norm is not None:
        norm = squares[0].sqrt()
        if batch.grad_scale is not None:
            skip = skip | ~norm.isfinite()
        scale = scale * (batch.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def store(target: Tensor, value: Tensor) -> None:
        target.copy_(torch.where(skip, target, value.to(target.dtype)))

    for i, param in enumerate(batch.params):
        if param.numel() == 0:
            store(batch.steps[i], batch.steps[i] + 1)
            continue
        dtype = compute_dtype(param)
        h = batch.hyper[batch.groups[i]].to(device)
        step = batch.steps[i].double() + 1
        remainder = _entry(batch.remainders, i)
        if remainder is not None:
            remainder = _storage.flat(remainder)
        w = _storage.load_param(_storage.flat(param), remainder).to(dtype)
        sign = torch.where(h[columns.index("maximize")] != 0, -scale, scale)
        g = _storage.flat(batch.grads[i]).to(dtype) * sign.to(dtype)
        stored = [None if _entry(ms, i) is None else _storage.flat(ms[i]) for ms in batch.moments]
        scales = [_entry(s, i) for s in batch.moment_scales] or [None] * len(stored)
        old = [
            None if m is None else _storage.load(m, s, signed=k == 0).to(dtype)
            for k, (m, s) in enumerate(zip(stored, scales, strict=True))
        ]
        new_w, *new = rule(h, step, w, g, *old)
        if (anchor := _entry(batch.anchors, i)) is not None:
            w0 = _storage.flat(anchor).to(dtype)
            c = h[columns.index("lr")] * h[columns.index("anchor_decay")].clamp(max=HARDEST)
            c = c.clamp(max=HARDEST).to(dtype)
            f = _entry(batch.curvature, i)
            if f is not None:
                f = _storage.load(_storage.flat(f), _entry(batch.curvature_scales, i), signed=False)
                c = c * f.to(dtype)
            # From w0 on for a strong pull: w may be so large that w0 is lost in it.
            weak, strong = new_w + c / (1 + c) * (w0 - new_w), w0 + (new_w - w0) / (1 + c)
            new_w = torch.where(c > 1, strong, weak)
            away = (new_w - w0).double().square()
            squares[1] += away.sum()
            squares[3] += (away if f is None else away * f.double()).sum()
        squares[2] += (new_w - w).double().square().sum()
        for target, value in _storage.store_param(_storage.flat(param), remainder, new_w):
            store(target, value)
        for k, (m, s, value) in enumerate(zip(stored, scales, new, strict=True)):
            if m is not None:
                draws = functools.partial(_storage.draws, param.numel(), batch.seed, step)
                for target, part in _storage.store(m, s, value, draws, signed=k == 0):
                    store(target, part)
        store(batch.steps[i], step)
    if batch.stats is not None:
        squares[:3].sqrt_()
        squares[3] *= 0.5
        store(batch.stats, squares)
    write_back()
