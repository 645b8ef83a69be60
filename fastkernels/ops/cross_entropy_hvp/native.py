"""The Hessian of cross-entropy in the logits: csrc/cpu/cross_entropy.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels.backends import native
from fastkernels.ops.cross_entropy_hvp import reference

DTYPES = (torch.float32, torch.float64)


def _run(u: Tensor, p: Tensor, scale: Tensor, quad: Tensor | None) -> None:
    native.module().cross_entropy(
        u.data_ptr(), p.data_ptr(), scale.data_ptr(), 0 if quad is None else quad.data_ptr(),
        *u.shape, u.dtype == torch.float64, torch.get_num_threads(),
    )  # fmt: skip


def cross_entropy_hvp_(u: Tensor, p: Tensor, scale: Tensor) -> None:
    if u.dtype not in DTYPES:
        return reference.cross_entropy_hvp_(u, p, scale)
    return _run(u, p, scale, None)


def cross_entropy_quad(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    if u.dtype not in DTYPES:
        return reference.cross_entropy_quad(u, p, scale)
    quad = torch.empty(u.shape[0], dtype=torch.float64)
    _run(u, p, scale, quad)
    return quad
