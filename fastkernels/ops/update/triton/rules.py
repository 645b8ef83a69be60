"""The update rules as the Triton kernels call them: those of csrc/include/fast/update.h and
`fastkernels.ops.update.reference`.

`derive_*` makes of a row of the hyper table what is constant over a tensor, the `rule`; `apply_*`
makes of a rule and of the old numbers the new ones, but for the pull, which `pull_to` adds.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels.ops.update.adamw import ADAMW
from fastkernels.ops.update.call import MAX_PULL as _MAX_PULL
from fastkernels.ops.update.sgd import SGD

MAX_PULL = tl.constexpr(_MAX_PULL)
ADAMW_COLUMN = {name: k for k, name in enumerate(ADAMW.columns)}
SGD_COLUMN = {name: k for k, name in enumerate(SGD.columns)}


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, by squaring: exact to 1e-10 up to the last float32 step (2^24).

    libdevice's pow needs more registers than the whole update.
    """
    result = tl.full((), 1.0, tl.float64)
    left = exponent.to(tl.int32)
    while left > 0:
        result = tl.where(left & 1 != 0, result * base, result)
        base = base * base
        left = left >> 1
    return result


@triton.jit
def pull_of(lr, anchor_decay):
    """What csrc's `pull_of` gives: an infinite pull stays finite, so that a curvature of 0 takes it
    away."""
    c = lr * tl.where(anchor_decay > MAX_PULL, MAX_PULL, anchor_decay)
    return tl.where(c > MAX_PULL, MAX_PULL, c)


@triton.jit
def quotient(a, b):
    """a / b for b >= 0.

    In float32 by the hardware's 1 / sqrt(b), within 3 units in the last place: 3 instructions,
    where a division takes 8, 5 of them for a b beyond 2^126 or denormal. There it gives 0 or
    infinity, and b is 1 plus a pull, or sqrt(v) + eps, which is either 0 or above 1e-23.
    """
    if b.dtype == tl.float64:
        return a / b
    else:
        root = tl.rsqrt(b)
        return a * root * root


@triton.jit
def pull_to(w, w0, c):
    """The proximal step of c/2 (w - w0)^2, exact at c = 0 and at w = w0: from w on for a weak pull,
    and from w0 on for a strong one, where w may be so large that w0 is lost in it."""
    strong = c > 1
    return tl.where(strong, w0, w) + quotient(tl.where(strong, -1.0, c), 1 + c) * (w0 - w)


@triton.constexpr_function
def of_adamw(column):
    return ADAMW_COLUMN[column]


@triton.constexpr_function
def of_sgd(column):
    return SGD_COLUMN[column]


@triton.jit
def derive_adamw(
    h,  # float64 [7], a row of the hyper table
    step, scale, REAL: tl.constexpr,
):  # fmt: skip
    """What is constant over a tensor, from float64 and rounded once: 1 - 0.999f is off by 3e-5.
    The first two are the scale of gradients and the pull, for every rule."""
    lr = tl.load(h + of_adamw("lr"))
    beta1, beta2 = tl.load(h + of_adamw("beta1")), tl.load(h + of_adamw("beta2"))
    grad_scale = tl.where(tl.load(h + of_adamw("maximize")) != 0, -scale, scale)
    # As torch's lerp, from the end that is nearer: small gradients are not lost in a large m.
    from_gradient = 1 - beta1 >= 0.5
    share = tl.where(from_gradient, -beta1, 1 - beta1)
    correction = 1 / tl.sqrt(1 - power(beta2, step))
    step_size = lr / (1 - power(beta1, step))
    return (
        grad_scale.to(REAL),
        pull_of(lr, tl.load(h + of_adamw("anchor_decay"))).to(REAL),
        share.to(REAL),
        from_gradient,
        beta2.to(REAL),
        (1 - beta2).to(REAL),
        correction.to(REAL),
        tl.load(h + of_adamw("eps")).to(REAL),
        step_size.to(REAL),
        (1 - lr * tl.load(h + of_adamw("weight_decay"))).to(REAL),
    )


@triton.jit
def apply_adamw(rule, w, g, m, v, MOMENTS: tl.constexpr):
    """The new weights and moments, but for the pull."""
    _, _, share, from_gradient, beta2, one_minus_beta2, correction, eps, step_size, decay = rule
    m = tl.where(from_gradient, g, m) + share * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    denominator = tl.sqrt(v) * correction + eps
    return w * decay - step_size * quotient(m, denominator), m, v


@triton.jit
def derive_sgd(
    h,  # float64 [7], a row of the hyper table
    step, scale, REAL: tl.constexpr,
):  # fmt: skip
    """As `derive_adamw`. At the first step the momentum is the gradient itself."""
    lr, momentum = tl.load(h + of_sgd("lr")), tl.load(h + of_sgd("momentum"))
    nesterov = tl.load(h + of_sgd("nesterov")) != 0
    later = step != 1
    grad_scale = tl.where(tl.load(h + of_sgd("maximize")) != 0, -scale, scale)
    return (
        grad_scale.to(REAL),
        pull_of(lr, tl.load(h + of_sgd("anchor_decay"))).to(REAL),
        lr.to(REAL),
        tl.where(later, momentum, 0.0).to(REAL),
        tl.where(later, 1 - tl.load(h + of_sgd("dampening")), 1.0).to(REAL),
        nesterov,
        tl.where(nesterov, momentum, 1.0).to(REAL),
        tl.load(h + of_sgd("weight_decay")).to(REAL),
    )


@triton.jit
def apply_sgd(rule, w, g, b, v, MOMENTUM: tl.constexpr):
    _, _, lr, momentum, share, nesterov, indirect, weight_decay = rule
    g = g + weight_decay * w
    if MOMENTUM:
        b = momentum * b + share * g
        # Not nesterov * g: an infinite g must not make NaN.
        return w - lr * (indirect * b + tl.where(nesterov, g, 0.0)), b, v
    else:
        return w - lr * g, b, v
