"""What the Triton kernels of the anchored updates call: stored forms, and the rules.

The forms are those of csrc/include/fast/numeric.h and `fastkernels.codes`, the rules those of
csrc/include/fast/update.h and `.reference`. What is absent is None and decided by the compiler, not
by the kernel.

Pointers begin at the first element of a chunk of `count` elements: `at` `[count]` is a stored
tensor, `remainders` int16 `[count]`, `scales` float32 `[ceil(count / CODE_BLOCK)]`. `o` `[BLOCK]`
are the elements of this tile, and `keep` `[BLOCK]` masks a ragged end, or is None.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: SIM300

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels import codes
from fastkernels.ops.update.adamw import ADAMW
from fastkernels.ops.update.batch import HARDEST as _HARDEST
from fastkernels.ops.update.sgd import SGD

CODE_BLOCK = tl.constexpr(codes.CODE_BLOCK)
ONE = tl.constexpr(codes.ONE)
WARP = tl.constexpr(32)
MAGIC = tl.constexpr(0x4B000000)  # 2^23 in float32, whose last bit is 1
UNSIGNED_TOP, SIGNED_TOP = tl.constexpr(codes.UNSIGNED_TOP), tl.constexpr(codes.SIGNED_TOP)
SIGNED_FLAT, SIGNED_FINE = tl.constexpr(codes.SIGNED_FLAT), tl.constexpr(codes.SIGNED_FINE)
SIGNED_SHIFT, SIGNED_KNEE = tl.constexpr(codes.SIGNED_SHIFT), tl.constexpr(codes.SIGNED_KNEE)
LEAST_SCALE = tl.constexpr(codes.LEAST_SCALE)
HARDEST = tl.constexpr(_HARDEST)
ADAMW_COLUMN = {name: k for k, name in enumerate(ADAMW.columns)}
SGD_COLUMN = {name: k for k, name in enumerate(SGD.columns)}


@triton.jit
def mix32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def rounding_key(seed, step, begin):
    """The key of a chunk whose element o draws mix32(o ^ key): i = begin + o of a tensor draws
    mix32(uint32(i) ^ rounding_key(seed, step, i >> 32)), and `begin` has no bits of o."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key = mix32(mix32(low ^ mix32(high)) ^ step.to(tl.uint32))
    return mix32(key ^ (begin >> 32).to(tl.uint32)) ^ begin.to(tl.uint32)


@triton.jit
def load(at, o, keep):
    if keep is None:
        return tl.load(at + o)
    else:
        return tl.load(at + o, mask=keep, other=0)


@triton.jit
def store(at, o, keep, value):
    if keep is None:
        tl.store(at + o, value)
    else:
        tl.store(at + o, value, mask=keep)


@triton.jit
def to_bf16(x, random):
    """Bits of x in bfloat16: to nearest when `random` is None (the interpreter's own cast cuts
    off), up with the probability of the part cut off when it is a draw below 2^16."""
    bits = x.to(tl.uint32, bitcast=True)
    if random is None:
        random = 0x7FFF + ((bits >> 16) & 1)
    rounded = ((bits + random) >> 16).to(tl.uint16)
    rounded = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)
    return rounded.to(tl.bfloat16, bitcast=True)


@triton.jit
def decode(stored, scale, SIGNED: tl.constexpr, REAL: tl.constexpr):
    """A moment or the curvature, plain or of 8-bit codes and the scale of each."""
    if stored.dtype == tl.uint8:
        code = stored.to(tl.uint32)
        if SIGNED:
            size = code & 0x7F
            fine = ((size << 21) + ONE).to(tl.float32, bitcast=True) - 1.0
            # size - SIGNED_SHIFT in float32: conversions of integers run at a quarter of the rate.
            flat = (size | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + SIGNED_SHIFT)
            y = tl.where(size < SIGNED_KNEE, fine * (1.0 / SIGNED_FINE), flat)
        else:
            y = ((code << 20) + ONE).to(tl.float32, bitcast=True) - 1.0
        y = y * scale
        if SIGNED:
            y = (y.to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
        return y.to(REAL)
    else:
        return stored.to(REAL)


@triton.jit
def store_plain(at, o, keep, value):
    if at.dtype.element_ty == tl.bfloat16:
        store(at, o, keep, to_bf16(value.to(tl.float32), None))
    else:
        store(at, o, keep, value.to(at.dtype.element_ty))


@triton.jit
def spread(of_block, COUNT: tl.constexpr):
    """[BLOCKS] as [BLOCKS * COUNT], each entry COUNT times."""
    BLOCKS: tl.constexpr = of_block.shape[0]
    return tl.reshape(tl.broadcast_to(of_block[:, None], (BLOCKS, COUNT)), (BLOCKS * COUNT,))


@triton.jit
def encode(x, random, scales, at, count, keep, SIGNED: tl.constexpr):
    """Codes of x, the elements from `at` on; the scales of the blocks are stored."""
    BLOCKS: tl.constexpr = x.shape[0] // CODE_BLOCK
    top = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    bits = x.to(tl.uint32, bitcast=True)
    if SIGNED:
        bits &= 0x7FFFFFFF
    if keep is not None:
        bits = tl.where(keep, bits, 0)
    # Magnitudes order like their bits, and what is not finite comes last.
    most = tl.max(tl.reshape(bits.to(tl.int32), (BLOCKS, CODE_BLOCK)), axis=1)
    largest = most.to(tl.float32, bitcast=True)
    least = tl.where(most != 0, LEAST_SCALE, 0.0)
    scale = tl.where(most < 0x7F800000, tl.maximum(largest / top, least), float("nan"))
    inverse = top / largest
    inverse = tl.where(inverse < 1 / LEAST_SCALE, inverse, 1 / LEAST_SCALE)
    # A block is a warp's, which has its scale: the first of its threads stores it. As [BLOCKS] the
    # scales would go to other warps first, behind two barriers.
    thread = tl.arange(0, BLOCKS * WARP)
    block = at // CODE_BLOCK + thread // WARP
    first = thread % WARP == 0
    if keep is not None:
        first = first & (block * CODE_BLOCK < count)
    tl.store(scales + block, spread(scale, WARP), mask=first)
    y = tl.abs(x) * spread(inverse, CODE_BLOCK)
    if SIGNED:
        y = tl.where(y < SIGNED_TOP, y, SIGNED_TOP)  # a NaN, too, must fit an integer
        fine = (y * SIGNED_FINE + 1.0).to(tl.int32, bitcast=True) - ONE
        flat = (y * 2097152.0).to(tl.int32) + (SIGNED_SHIFT << 21)
        code = tl.where(y < SIGNED_FLAT, fine, flat).to(tl.uint32, bitcast=True) + 2 * random
        sign = (x.to(tl.uint32, bitcast=True) >> 24).to(tl.uint8) & 0x80
        return (code >> 21).to(tl.uint8) | sign
    else:
        code = (y + 1.0).to(tl.uint32, bitcast=True) - ONE + random
        # Divided by: a second moment above zero (of bits above 0) never becomes zero.
        least = tl.minimum(x.to(tl.uint32, bitcast=True) + 0xFFFFF, 0x100000)
        code = tl.maximum(tl.minimum(code, 0xFFFFFFF), least)
        return (code >> 20).to(tl.uint8)


@triton.jit
def store_state(
    to, scales, at, o, count, keep, value, key, SIGNED: tl.constexpr,
):  # fmt: skip
    """A moment. Second moments (not SIGNED) in bfloat16 and all codes round stochastically."""
    TYPE: tl.constexpr = to.dtype.element_ty
    if TYPE == tl.uint8:
        draw = mix32(o.to(tl.uint32) ^ key)
        random = draw >> 12 if SIGNED else (draw & 0xFFFF) << 4
        codes = encode(value.to(tl.float32), random, scales, at, count, keep, SIGNED)
        store(to, o, keep, codes)
    elif TYPE == tl.bfloat16 and not SIGNED:
        draw = mix32(o.to(tl.uint32) ^ key)
        store(to, o, keep, to_bf16(value.to(tl.float32), draw & 0xFFFF))
    else:
        store_plain(to, o, keep, value)


@triton.jit
def join(stored, remainder, REAL: tl.constexpr):
    """A parameter; bfloat16 with a remainder (of int16) is a float32."""
    if remainder.dtype != tl.int16:
        return stored.to(REAL)
    else:
        high = stored.to(tl.uint16, bitcast=True).to(tl.uint32)
        low = remainder.to(tl.int32)
        # A zero with a negative remainder was written by other code; it would become a NaN.
        low = tl.where((high & 0x7FFF) == 0, tl.maximum(low, 0), low)
        return ((high << 16) + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def store_param(at, remainders, o, keep, value):
    if remainders is None:
        store_plain(at, o, keep, value)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits, 0x7FC00000)
        high = (bits + 0x8000) >> 16
        low = (bits - (high << 16)).to(tl.int32, bitcast=True).to(tl.int16)
        store(at, o, keep, high.to(tl.uint16).to(tl.bfloat16, bitcast=True))
        store(remainders, o, keep, low)


# The rules. `rule` is what `derive` made of a row of the hyper table.


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
    c = lr * tl.where(anchor_decay > HARDEST, HARDEST, anchor_decay)
    return tl.where(c > HARDEST, HARDEST, c)


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
