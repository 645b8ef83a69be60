"""SGD with a pull towards an anchor in Triton; the equation is in `.reference`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels import _update, _update_triton
from fastkernels._update_triton_device import pull_of, update_chunk


@triton.jit
def derive(h, step, scale, REAL: tl.constexpr):
    """What is constant over a tensor. At the first step the momentum is the gradient itself."""
    lr, momentum = tl.load(h), tl.load(h + 1)
    nesterov = tl.load(h + 3) != 0
    later = step != 1
    grad_scale = tl.where(tl.load(h + 6) != 0, -scale, scale)
    return (
        grad_scale.to(REAL),
        pull_of(lr, tl.load(h + 5)).to(REAL),
        lr.to(REAL),
        tl.where(later, momentum, 0.0).to(REAL),
        tl.where(later, 1 - tl.load(h + 2), 1.0).to(REAL),
        nesterov,
        tl.where(nesterov, momentum, 1.0).to(REAL),
        tl.load(h + 4).to(REAL),
    )


@triton.jit
def apply(rule, w, g, b, v, MOMENTUM: tl.constexpr):
    _, _, lr, momentum, share, nesterov, indirect, weight_decay = rule
    g = g + weight_decay * w
    if MOMENTUM:
        b = momentum * b + share * g
        # Not nesterov * g: an infinite g must not make NaN.
        return w - lr * (indirect * b + tl.where(nesterov, g, 0.0)), b, v
    else:
        return w - lr * g, b, v


@triton.jit(do_not_specialize=["first_chunk", "chunk_count"])
def anchored_sgd_kernel(
    table, grads, chunks, first_chunk, chunk_count, hyper, seed, control, grad_scale, found_inf,
    partial, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    F: tl.constexpr, REMAINDER: tl.constexpr, REAL: tl.constexpr, CLIP: tl.constexpr,
    STATS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    update_chunk(
        derive, apply, table, grads, chunks, first_chunk, chunk_count, hyper, seed, control,
        grad_scale, found_inf, partial, P, G, M, V, A, F, REMAINDER, REAL, CLIP, STATS, ALIGN,
        BLOCK,
    )  # fmt: skip


def anchored_sgd_(batch: _update.Batch) -> None:
    """Update every tensor of `batch` in place."""
    _update_triton.run(batch, anchored_sgd_kernel)
