"""The Hessian of cross-entropy in the logits, in Triton; the equation is in `.reference`.

A program takes one row for all K vectors, so that p is read once. Up to C = 16384 the row of p and
the row of u stay on chip, and every u is read and written once; wider rows are swept twice.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ON_CHIP = 16384
SWEEP = 4096


@triton.jit
def cross_entropy_hvp_kernel(
    u, p, scale, quad, K, N, C,
    REAL: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    a = tl.load(scale + n).to(REAL)
    columns = tl.arange(0, BLOCK)
    one = tl.full((), 1, tl.int64)  # K N C may exceed 2^31
    row = u + n * C
    form = quad + n
    if WHOLE:
        inside = columns < C
        w = tl.load(p + n * C + columns, mask=inside, other=0.0).to(REAL)
    for _ in range(K):
        if WHOLE:
            v = tl.load(row + columns, mask=inside, other=0.0).to(REAL)
            centred = v - tl.sum(w * v, 0)
            if WRITE:
                tl.store(row + columns, (a * w * centred).to(u.dtype.element_ty), mask=inside)
            else:
                total = tl.sum(w * centred * centred, 0)
                tl.store(form, (a * total).to(tl.float64))
        else:
            dot = tl.zeros([BLOCK], REAL)
            for start in range(0, C, BLOCK):
                at = start + columns
                w = tl.load(p + n * C + at, mask=at < C, other=0.0).to(REAL)
                dot += w * tl.load(row + at, mask=at < C, other=0.0).to(REAL)
            mean = tl.sum(dot, 0)
            total = tl.zeros([BLOCK], REAL)
            for start in range(0, C, BLOCK):
                at = start + columns
                w = tl.load(p + n * C + at, mask=at < C, other=0.0).to(REAL)
                centred = tl.load(row + at, mask=at < C, other=0.0).to(REAL) - mean
                if WRITE:
                    tl.store(row + at, (a * w * centred).to(u.dtype.element_ty), mask=at < C)
                else:
                    total += w * centred * centred
            if not WRITE:
                tl.store(form, (a * tl.sum(total, 0)).to(tl.float64))
        row += one * N * C
        form += N


def launch_options(classes: int, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments for rows of `classes` logits."""
    whole = classes <= ON_CHIP
    block = triton.next_power_of_2(classes) if whole else SWEEP
    return {
        "REAL": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": block,
        "WHOLE": whole,
        "num_warps": max(1, min(16, block // 512)),
    }


def _run(u: Tensor, p: Tensor, scale: Tensor, quad: Tensor | None) -> None:
    num_vectors, rows, classes = u.shape
    with torch.cuda.device_of(u):
        cross_entropy_hvp_kernel[(rows,)](
            u, p, scale, u if quad is None else quad, num_vectors, rows, classes,
            WRITE=quad is None, **launch_options(classes, u.dtype),
        )  # fmt: skip


def cross_entropy_hvp_(u: Tensor, p: Tensor, scale: Tensor) -> None:
    _run(u, p, scale, None)


def cross_entropy_quad(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    rows = torch.empty(u.shape[:2], dtype=torch.float64, device=u.device)
    _run(u, p, scale, rows)
    return rows.sum(1)
