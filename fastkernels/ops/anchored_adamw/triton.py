"""AdamW with a pull towards an anchor in Triton; the equation is in `.reference`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels import _update, _update_triton
from fastkernels._update_triton_device import power, pull_of, update_chunk


@triton.jit
def derive(h, step, scale, REAL: tl.constexpr):
    """What is constant over a tensor, from float64 and rounded once: 1 - 0.999f is off by 3e-5."""
    lr, beta1, beta2 = tl.load(h), tl.load(h + 1), tl.load(h + 2)
    grad_scale = tl.where(tl.load(h + 6) != 0, -scale, scale)
    # As torch's lerp, from the end that is nearer: small gradients are not lost in a large m.
    from_gradient = 1 - beta1 >= 0.5
    share = tl.where(from_gradient, -beta1, 1 - beta1)
    correction = 1 / tl.sqrt(1 - power(beta2, step))
    step_size = lr / (1 - power(beta1, step))
    return (
        grad_scale.to(REAL),
        pull_of(lr, tl.load(h + 5)).to(REAL),
        share.to(REAL),
        from_gradient,
        beta2.to(REAL),
        (1 - beta2).to(REAL),
        correction.to(REAL),
        tl.load(h + 3).to(REAL),
        step_size.to(REAL),
        (1 - lr * tl.load(h + 4)).to(REAL),
    )


@triton.jit
def apply(rule, w, g, m, v, MOMENTS: tl.constexpr):
    _, _, share, from_gradient, beta2, one_minus_beta2, correction, eps, step_size, decay = rule
    m = tl.where(from_gradient, g, m) + share * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    denominator = tl.sqrt(v) * correction + eps
    return w * decay - step_size * (m / denominator), m, v


@triton.jit(do_not_specialize=["first_chunk", "chunk_count"])
def anchored_adamw_kernel(
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


def anchored_adamw_(batch: _update.Batch) -> None:
    """Update every tensor of `batch` in place."""
    _update_triton.run(batch, anchored_adamw_kernel)
