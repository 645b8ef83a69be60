"""The anchored updates in Triton: one launch per kind of tensor, and what goes before and after.

1. With clipping: `gradient_norm_kernel` reads the gradients, and `clip_kernel` makes of its sums
   the norm, the scale of the gradients, and whether the step is skipped.
2. The update, a program per chunk of 16384 elements.
3. `finish_kernel`: the four figures from the chunks' sums, and the step counts.

Every sum is in fixed order; nothing is read by the host. Hyper-parameters, loss scale and found_inf
are read from device memory, so a captured graph follows them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastkernels import _update_tables
from fastkernels._signature import ALIGNMENT
from fastkernels._update import Batch
from fastkernels._update_triton_device import STEP, WIDTH, WORDS, chunk_of, gradient_scale
from fastkernels._update_triton_storage import load

# Four elements per thread: 128-bit accesses of float32. ptxas takes up to 93 registers, and fits
# them into 64 without a spill when asked: 4 programs of 256 threads then share a multiprocessor.
BLOCK = 1024
REGISTERS = 64
# What would spill at 64 registers (8-bit codes, remainders, float64) gets as many as it needs,
# 72 to 138, and half the threads.
HEAVY_BLOCK = 512
_REDUCE, _WARPS = 1024, 8
_TYPES = {1: tl.float32, 2: tl.float64, 3: tl.bfloat16, 4: tl.float16, 5: tl.uint8}


class Kind(NamedTuple):
    """What the update kernel is compiled for: storage types (None: absent), alignment, block."""

    P: Any
    G: Any
    M: Any
    V: Any
    A: Any
    F: Any
    REMAINDER: bool
    REAL: Any
    ALIGN: int
    BLOCK: int

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler."""
        limit = {"maxnreg": REGISTERS} if self.BLOCK == BLOCK else {}
        return {"num_warps": self.BLOCK // (32 * WIDTH.value), **limit}


def kind_of(types: bytes, remainder: bool, aligned: bool) -> Kind:
    """Of a row, from the codes of its dtypes."""
    p, g, m, v, a, f = (_TYPES.get(t) for t in types)
    if a is None:  # without an anchor there is nothing for the curvature to weigh
        f = None
    real = tl.float64 if p == tl.float64 else tl.float32
    heavy = remainder or real == tl.float64 or tl.uint8 in (m, v, f)
    block = HEAVY_BLOCK if heavy else BLOCK
    return Kind(p, g, m, v, a, f, remainder, real, ALIGNMENT if aligned else 1, block)


@triton.jit(do_not_specialize=["first_chunk"])
def gradient_norm_kernel(
    grads, chunks, first_chunk, partial, G: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """partial[chunk] = the sum of squares, in float64: squares of float32 may overflow."""
    slot = first_chunk + tl.program_id(0)
    row, begin, count = chunk_of(chunks, slot)
    g = tl.load(grads + row).to(tl.pointer_type(G)) + begin
    g = tl.multiple_of(g, ALIGN)
    total = tl.zeros((BLOCK,), tl.float64)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        x = load(g, at + tl.arange(0, BLOCK), None).to(tl.float64)
        total += x * x
    if whole < count:
        o = whole + tl.arange(0, BLOCK)
        x = load(g, o, o < count).to(tl.float64)
        total += x * x
    tl.store(partial + slot, tl.sum(total, 0))


@triton.jit
def sum_of(partial, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, count, BLOCK):
        o = at + tl.arange(0, BLOCK)
        total += tl.load(partial + o, mask=o < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["chunk_count"])
def clip_kernel(partial, chunk_count, max_norm, control, grad_scale, found_inf,
                BLOCK: tl.constexpr):  # fmt: skip
    """control = norm, what gradients are multiplied by, whether to skip."""
    scale, skip = gradient_scale(control, grad_scale, found_inf, False)
    norm = tl.sqrt(sum_of(partial, chunk_count, BLOCK)) * scale
    if grad_scale is not None:
        skip = skip | ~(norm < float("inf"))
    coefficient = tl.load(max_norm) / (norm + 1e-6)  # torch's clip_grad_norm_
    # NaN clips too: it must reach the weights.
    scale = tl.where(coefficient >= 1, scale, scale * coefficient)
    tl.store(control, norm)
    tl.store(control + 1, scale)
    tl.store(control + 2, skip.to(tl.float64))


@triton.jit(do_not_specialize=["chunk_count", "row_count"])
def finish_kernel(
    table, row_count, partial, chunk_count, control, grad_scale, found_inf, stats,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A single program, after the update: nothing else reads or writes the step counts then."""
    _, skip = gradient_scale(control, grad_scale, found_inf, CLIP)
    if not skip:
        for at in range(0, row_count, BLOCK):
            o = at + tl.arange(0, BLOCK)
            keep = o < row_count
            address = tl.load(table + o.to(tl.int64) * WORDS + STEP, mask=keep, other=0)
            step = address.to(tl.pointer_type(tl.float32))
            tl.store(step, tl.load(step, mask=keep, other=0.0) + 1, mask=keep)
        if stats is not None:
            if CLIP:
                tl.store(stats, tl.load(control))
            else:
                tl.store(stats, tl.sqrt(sum_of(partial, chunk_count, BLOCK)))
            drift = sum_of(partial + chunk_count, chunk_count, BLOCK)
            change = sum_of(partial + 2 * chunk_count, chunk_count, BLOCK)
            forgetting = sum_of(partial + 3 * chunk_count, chunk_count, BLOCK)
            tl.store(stats + 1, tl.sqrt(drift))
            tl.store(stats + 2, tl.sqrt(change))
            tl.store(stats + 3, 0.5 * forgetting)


def run(batch: Batch, kernel: Any) -> None:
    """Step `batch` by the update kernel of one op."""
    what = kind_of, batch.seed, batch.max_grad_norm
    plan, batch, addresses, write_back = _update_tables.PLANS.find(batch, *what)
    device = batch.params[0].device
    grad_scale = _update_tables.flag(batch.grad_scale, device)
    found_inf = _update_tables.flag(batch.found_inf, device)
    hyper = batch.hyper.to(device)
    grads = plan.upload(addresses)
    clip = batch.max_grad_norm is not None
    chunk_count = plan.partial.shape[1]
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        if clip:
            for launch in plan.launches:
                gradient_norm_kernel[(launch.count,)](
                    grads, plan.chunks, launch.first, plan.partial, G=launch.kind.G,
                    ALIGN=launch.kind.ALIGN, BLOCK=BLOCK, num_warps=_WARPS,
                )  # fmt: skip
            clip_kernel[(1,)](
                plan.partial, chunk_count, plan.max_norm, plan.control,
                grad_scale, found_inf, BLOCK=_REDUCE, num_warps=_WARPS,
            )  # fmt: skip
        for launch in plan.launches:
            kernel[(launch.count,)](
                plan.rows, grads, plan.chunks, launch.first, chunk_count, hyper,
                plan.seed, plan.control, grad_scale, found_inf, plan.partial,
                **launch.kind._asdict(), CLIP=clip, STATS=batch.stats is not None,
                **launch.kind.options,
            )  # fmt: skip
        finish_kernel[(1,)](
            plan.rows, len(batch.params), plan.partial, chunk_count, plan.control,
            grad_scale, found_inf, batch.stats, CLIP=clip, BLOCK=_REDUCE, num_warps=_WARPS,
        )  # fmt: skip
    write_back()
    # The kernels write behind autograd's back: a graph that saved a parameter must notice.
    torch.autograd.graph.increment_version(batch.params)
