"""Stored tensors in Triton, to and from the dtype of the arithmetic.

The forms are those of csrc/include/fast/numeric.h and `fastkernels._storage`. What is absent is
None and decided by the compiler, not by the kernel; `keep` masks a ragged end, or is None.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: SIM300

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels import _update

CODE_BLOCK = tl.constexpr(_update.CODE_BLOCK)
ONE = tl.constexpr(0x3F800000)
# numeric.h's constants of the same names.
UNSIGNED_TOP = tl.constexpr(4026531839.0)
SIGNED_TOP, SIGNED_FLAT, SIGNED_FINE = (
    tl.constexpr(80.0),
    tl.constexpr(9.0),
    tl.constexpr(16383 / 9),
)
SIGNED_SHIFT, SIGNED_KNEE = tl.constexpr(47), tl.constexpr(56)
LEAST_SCALE = tl.constexpr(2.0**-126)


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
    """Of a chunk: element i draws mix32(uint32(i) ^ key); a chunk never straddles 2^32."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key = mix32(mix32(low ^ mix32(high)) ^ step.to(tl.uint32))
    return mix32(key ^ (begin >> 32).to(tl.uint32))


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
def load_state(at, scales, o, keep, SIGNED: tl.constexpr, REAL: tl.constexpr):
    """A moment or the curvature, plain or of 8-bit codes with their scales."""
    stored = load(at, o, keep)
    if stored.dtype == tl.uint8:
        code = stored.to(tl.uint32)
        if SIGNED:
            size = code & 0x7F
            fine = ((size << 21) + ONE).to(tl.float32, bitcast=True) - 1.0
            flat = (size.to(tl.int32) - SIGNED_SHIFT).to(tl.float32)
            y = tl.where(size < SIGNED_KNEE, fine * (1.0 / SIGNED_FINE), flat)
        else:
            y = ((code << 20) + ONE).to(tl.float32, bitcast=True) - 1.0
        y = y * load(scales, o // CODE_BLOCK, keep)
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
def encode(x, random, scales, o, keep, SIGNED: tl.constexpr):
    """Codes of x; the scales of the blocks are stored."""
    BLOCKS: tl.constexpr = x.shape[0] // CODE_BLOCK
    top = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    bits = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    if keep is not None:
        bits = tl.where(keep, bits, 0)
    # Magnitudes order like their bits, and what is not finite comes last.
    most = tl.max(tl.reshape(bits.to(tl.int32), (BLOCKS, CODE_BLOCK)), axis=1)
    largest = most.to(tl.float32, bitcast=True)
    least = tl.where(most != 0, LEAST_SCALE, 0.0)
    scale = tl.where(most < 0x7F800000, tl.maximum(largest / top, least), float("nan"))
    inverse = top / largest
    inverse = tl.where(inverse < 1 / LEAST_SCALE, inverse, 1 / LEAST_SCALE)
    first = tl.reshape(o, (BLOCKS, CODE_BLOCK))
    block = tl.min(first, axis=1) // CODE_BLOCK
    if keep is None:
        tl.store(scales + block, scale)
    else:
        tl.store(scales + block, scale, mask=tl.max(
            tl.reshape(keep.to(tl.int32), (BLOCKS, CODE_BLOCK)), axis=1) != 0)  # fmt: skip
    inverse = tl.broadcast_to(inverse[:, None], (BLOCKS, CODE_BLOCK))
    y = tl.abs(x) * tl.reshape(inverse, (BLOCKS * CODE_BLOCK,))
    if SIGNED:
        y = tl.where(y < SIGNED_TOP, y, SIGNED_TOP)  # a NaN, too, must fit an integer
        fine = (y * SIGNED_FINE + 1.0).to(tl.int32, bitcast=True) - ONE
        flat = (y * 2097152.0).to(tl.int32) + (SIGNED_SHIFT << 21)
        code = tl.where(y < SIGNED_FLAT, fine, flat).to(tl.uint32, bitcast=True) + 2 * random
        code = (code >> 21) | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    else:
        code = ((y + 1.0).to(tl.uint32, bitcast=True) - ONE + random) >> 20
        code = tl.minimum(code, 255)
        # Divided by: a second moment above zero never becomes zero.
        code = tl.where((code == 0) & (x > 0), 1, code)
    return code.to(tl.uint8)


@triton.jit
def store_state(at, scales, o, keep, value, key, begin, SIGNED: tl.constexpr):
    """A moment. Second moments (not SIGNED) in bfloat16 and all codes round stochastically."""
    TYPE: tl.constexpr = at.dtype.element_ty
    if TYPE == tl.uint8:
        draw = mix32((begin.to(tl.uint32) + o.to(tl.uint32)) ^ key)
        random = draw >> 12 if SIGNED else (draw & 0xFFFF) << 4
        store(at, o, keep, encode(value.to(tl.float32), random, scales, o, keep, SIGNED))
    elif TYPE == tl.bfloat16 and not SIGNED:
        draw = mix32((begin.to(tl.uint32) + o.to(tl.uint32)) ^ key)
        store(at, o, keep, to_bf16(value.to(tl.float32), draw & 0xFFFF))
    else:
        store_plain(at, o, keep, value)


@triton.jit
def load_param(at, remainders, o, keep, REAL: tl.constexpr):
    """A parameter; bfloat16 with remainders is a float32."""
    stored = load(at, o, keep)
    if remainders is None:
        return stored.to(REAL)
    else:
        high = stored.to(tl.uint16, bitcast=True).to(tl.uint32)
        low = load(remainders, o, keep).to(tl.int32)
        # A zero with a negative remainder was written by somebody else; it would become a NaN.
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
