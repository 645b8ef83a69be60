"""Conversions of optimizer state: dtypes, layouts, and the forms curvature comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.float64)


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in STATE_DTYPES:
        known = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(f"{name} must be None or one of {known}; got {dtype}")


def copy_like(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `value` in the layout of `p`, which no gradient reaches."""
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value.detach())


def adopt(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` itself when dtype, device and layout are right (as torch does), else a copy."""
    if value.dtype == dtype and value.device == p.device and value.stride() == p.stride():
        return value
    return copy_like(value, p, dtype)


def match_curvature(params: Sequence[Tensor], curvature: Any) -> list[Tensor | None]:
    """A curvature tensor (or None) for each of `params`.

    Args:
        curvature: a list of tensors in the order and shapes of `params`, or an object whose
            `curvature_for(params)` gives such a list (`fast.SourceCard`).

    Raises:
        ValueError: number or shapes do not fit, or a value is negative or not finite.
    """
    if hasattr(curvature, "curvature_for"):
        curvature = curvature.curvature_for(params)
    found = list(curvature)
    if len(found) != len(params):
        raise ValueError(f"curvature: {len(found)} tensors for {len(params)} parameters")
    for i, (p, f) in enumerate(zip(params, found, strict=True)):
        if f is None:
            continue
        if f.shape != p.shape:
            raise ValueError(f"curvature[{i}] is {list(f.shape)}, its parameter {list(p.shape)}")
        if f.numel() and not bool(((f >= 0) & f.isfinite()).all()):
            raise ValueError(
                f"curvature[{i}] has negative or non-finite values; clamp it (a Hessian diagonal "
                "may be negative, a GGN or Fisher diagonal is not)"
            )
    return found
