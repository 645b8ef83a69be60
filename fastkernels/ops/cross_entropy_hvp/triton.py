"""The Hessian of cross-entropy in the logits, in Triton; the equation is in `.reference`.

A program takes a few whole rows for all K vectors, so that p is read once. Up to C = 32768 rows
stay on chip, and every u is read and written once; wider rows are swept twice.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of both u and p stay on chip up to here; those of u alone; columns of a sweep above that.
ROWS_ON_CHIP, ON_CHIP, SWEEP = 16384, 32768, 8192
# Elements of a program of several rows. Bandwidth on an H200, of a copy's, see docs/curvature.md.
TILE = 2048


@triton.jit(do_not_specialize=["K", "N"])
def rows_kernel(
    u,  # [K, N, C], read, and overwritten with WRITE
    p,  # [N, C]
    scale,  # [N]
    quad,  # float64 [K, N], written without WRITE
    K, N, C: tl.constexpr,
    REAL: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of BLOCK >= C columns. C is a constant of the kernel: what divides it decides how
    wide an access may be."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = n < N
    a = tl.load(scale + n, mask=present, other=0.0).to(REAL)
    columns = tl.arange(0, BLOCK)
    inside = present[:, None] & (columns < C)[None, :]
    at = n[:, None] * C + columns[None, :]
    stride = tl.full((), 1, tl.int64) * N * C  # K N C may exceed 2^31
    w = tl.load(p + at, mask=inside, other=0.0).to(REAL)
    row = u
    form = quad + n
    for _ in range(K):
        v = tl.load(row + at, mask=inside, other=0.0).to(REAL)
        deviation = v - tl.sum(w * v, 1)[:, None]
        if WRITE:
            tl.store(row + at, (a[:, None] * w * deviation).to(u.dtype.element_ty), mask=inside)
        else:
            tl.store(form, (a * tl.sum(w * deviation * deviation, 1)).to(tl.float64), mask=present)
        row += stride
        form += N


@triton.jit(do_not_specialize=["K", "N"])
def long_kernel(
    u,  # [K, N, C], read, and overwritten with WRITE
    p,  # [N, C]
    scale,  # [N]
    quad,  # float64 [K, N], written without WRITE
    K, N, C: tl.constexpr,
    REAL: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of BLOCK >= C columns: u stays on chip, p is read twice for each vector, from
    cache."""
    n = tl.program_id(0).to(tl.int64)
    a = tl.load(scale + n).to(REAL)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    stride = tl.full((), 1, tl.int64) * N * C
    row = u + n * C
    weights = p + n * C
    form = quad + n
    for _ in range(K):
        v = tl.load(row + columns, mask=inside, other=0.0).to(REAL)
        w = tl.load(weights + columns, mask=inside, other=0.0, eviction_policy="evict_last")
        mean = tl.sum(w.to(REAL) * v, 0)
        # With another policy, or the compiler keeps the first one's registers and spills.
        again = tl.load(weights + columns, mask=inside, other=0.0).to(REAL)
        if WRITE:
            new = again * (a * v - a * mean)
            tl.store(row + columns, new.to(u.dtype.element_ty), mask=inside)
        else:
            deviation = v - mean
            tl.store(form, (a * tl.sum(again * deviation * deviation, 0)).to(tl.float64))
        row += stride
        form += N


@triton.jit(do_not_specialize=["K", "N"])
def wide_kernel(
    u,  # [K, N, C], read, and overwritten with WRITE
    p,  # [N, C]
    scale,  # [N]
    quad,  # float64 [K, N], written without WRITE
    K, N, C: tl.constexpr,
    REAL: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, swept twice by BLOCK columns: the second time from cache."""
    n = tl.program_id(0).to(tl.int64)
    a = tl.load(scale + n).to(REAL)
    columns = tl.arange(0, BLOCK)
    stride = tl.full((), 1, tl.int64) * N * C
    row = u + n * C
    weights = p + n * C
    form = quad + n
    for _ in range(K):
        dot = tl.zeros([BLOCK], REAL)
        for start in range(0, C, BLOCK):
            at = start + columns
            w = tl.load(weights + at, mask=at < C, other=0.0, eviction_policy="evict_last")
            v = tl.load(row + at, mask=at < C, other=0.0, eviction_policy="evict_last")
            dot += w.to(REAL) * v.to(REAL)
        mean = tl.sum(dot, 0)
        total = tl.zeros([BLOCK], REAL)
        for start in range(0, C, BLOCK):
            at = start + columns
            w = tl.load(weights + at, mask=at < C, other=0.0, eviction_policy="evict_last").to(REAL)
            v = tl.load(row + at, mask=at < C, other=0.0, eviction_policy="evict_first").to(REAL)
            deviation = v - mean
            if WRITE:
                tl.store(row + at, (a * w * deviation).to(u.dtype.element_ty), mask=at < C)
            else:
                total += w * deviation * deviation
        if not WRITE:
            tl.store(form, (a * tl.sum(total, 0)).to(tl.float64))
        row += stride
        form += N


def launch(classes: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The kernel for rows of `classes` logits and its compile-time arguments."""
    options: dict[str, Any] = {"REAL": tl.float64 if dtype == torch.float64 else tl.float32}
    block = triton.next_power_of_2(classes)
    if block <= ROWS_ON_CHIP:
        rows = max(1, TILE // block)
        warps = max(1, min(16, rows * block // 512))
        return rows_kernel, options | {"ROWS": rows, "BLOCK": block, "num_warps": warps}
    if block <= ON_CHIP and dtype != torch.float64:
        return long_kernel, options | {"BLOCK": block, "num_warps": 32}
    # Few programs at a time, so that their rows stay in the L2 between the two sweeps.
    return wide_kernel, options | {"BLOCK": SWEEP, "num_warps": 32}


def _run(u: Tensor, p: Tensor, scale: Tensor, quad: Tensor | None) -> None:
    num_vectors, rows, classes = u.shape
    kernel, options = launch(classes, u.dtype)
    programs = triton.cdiv(rows, options.get("ROWS", 1))
    with torch.cuda.device_of(u):
        kernel[(programs,)](
            u, p, scale, u if quad is None else quad, num_vectors, rows, classes,
            WRITE=quad is None, **options,
        )  # fmt: skip


def cross_entropy_hvp_(u: Tensor, p: Tensor, scale: Tensor) -> None:
    _run(u, p, scale, None)


def cross_entropy_quad(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    rows = torch.empty(u.shape[:2], dtype=torch.float64, device=u.device)
    _run(u, p, scale, rows)
    return rows.sum(1)
