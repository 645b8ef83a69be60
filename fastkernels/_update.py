"""What the anchored updates share: the batch of tensors they work on, and their reference.

A rule (AdamW, SGD) only says how one tensor moves; this file does the rest of the job around it:
gradient scale, clipping, the pull to the anchor, the norms, and a non-finite step that changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STATS = ("grad_norm", "drift", "update_norm", "forgetting")
Optionals = Sequence[Tensor | None]


@dataclass(slots=True)
class Batch:
    """One call: parallel lists over `[N]` tensors; see the public functions for their meaning."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    moments: tuple[Sequence[Tensor], ...]
    steps: Sequence[Tensor]
    hyper: Tensor
    groups: Sequence[int]
    anchors: Optionals = ()
    curvature: Optionals = ()
    curvature_scales: Optionals = ()
    moment_scales: tuple[Sequence[Tensor], ...] = ()
    remainders: Sequence[Tensor] = ()
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    stats: Tensor | None = None
    seed: int = 0
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)


# (row of hyper, step [], w, g, *moments) -> (new w, *new moments), all flat in the compute dtype
Rule = Callable[..., tuple[Tensor, ...]]


def compute_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def flat(t: Tensor) -> Tensor:
    """`t` in the order of its storage; `t` must be dense and not overlap itself."""
    return t.as_strided((t.numel(),), (1,))


def pick(tensors: Sequence[Any], i: int) -> Any:
    """Entry i of an optional list: None when the list is off or the entry is empty."""
    t = tensors[i] if tensors else None
    return None if t is None or t.numel() == 0 else t


def run_reference(batch: Batch, rule: Rule, anchor_decay: int, maximize: int) -> None:
    """Apply `rule` to every tensor. Columns of `batch.hyper`: 0 is lr, and the two given."""
    from fastkernels import _checks

    batch = _checks.align(batch)
    device = batch.params[0].device
    scale = torch.ones((), dtype=torch.float64, device=device)
    if batch.grad_scale is not None:
        scale = scale / batch.grad_scale.to(device).double()
    squares = torch.zeros(4, dtype=torch.float64, device=device)
    for g in batch.grads:
        squares[0] += (flat(g).double() * scale).square().sum()
    if batch.max_grad_norm is not None:
        norm = squares[0].sqrt()
        scale = scale * (batch.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    skip = None if batch.found_inf is None else batch.found_inf.to(device).reshape(()) != 0

    def store(target: Tensor, value: Tensor) -> None:
        target.copy_(value if skip is None else torch.where(skip, target, value))

    for i, param in enumerate(batch.params):
        dtype = compute_dtype(param)
        h = batch.hyper[batch.groups[i]]
        w = flat(param).to(dtype)
        g = flat(batch.grads[i]).to(dtype) * torch.where(h[maximize] != 0, -scale, scale).to(dtype)
        step = batch.steps[i].double() + 1
        old = [None if m.numel() == 0 else flat(m) for m in (ms[i] for ms in batch.moments)]
        new_w, *new = rule(h, step, w, g, *(m if m is None else m.to(dtype) for m in old))
        if (anchor := pick(batch.anchors, i)) is not None:
            w0 = flat(anchor).to(dtype)
            c = (h[0] * h[anchor_decay]).to(dtype)
            f = pick(batch.curvature, i)
            c = c if f is None else c * flat(f).to(dtype)
            new_w = new_w + c / (1 + c) * (w0 - new_w)
            away = (new_w - w0).double().square()
            squares[1] += away.sum()
            squares[3] += (away if f is None else away * flat(f).double()).sum()
        squares[2] += (new_w - w).double().square().sum()
        store(flat(param), new_w)
        for m, value in zip(old, new, strict=True):
            if m is not None:
                store(m, value)
        store(batch.steps[i], step)
    if batch.stats is not None:
        squares[:3].sqrt_()
        squares[3] *= 0.5
        store(batch.stats, squares)
    _checks.write_back(batch)
