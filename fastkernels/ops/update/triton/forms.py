"""How the Triton kernels of the anchored updates load and store parameters and state.

The forms are those of csrc/include/fast/numeric.h and `fastkernels.codes`. What is absent is None
and decided by the compiler, not by the kernel.

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

CODE_BLOCK = tl.constexpr(codes.CODE_BLOCK)
ONE = tl.constexpr(codes.ONE)
WARP = tl.constexpr(32)
MAGIC = tl.constexpr(0x4B000000)  # 2^23 in float32, whose last bit is 1
UNSIGNED_TOP, SIGNED_TOP = tl.constexpr(codes.UNSIGNED_TOP), tl.constexpr(codes.SIGNED_TOP)
SIGNED_FLAT, SIGNED_FINE = tl.constexpr(codes.SIGNED_FLAT), tl.constexpr(codes.SIGNED_FINE)
SIGNED_SHIFT, SIGNED_KNEE = tl.constexpr(codes.SIGNED_SHIFT), tl.constexpr(codes.SIGNED_KNEE)
LEAST_SCALE = tl.constexpr(codes.LEAST_SCALE)


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
    high = ((bits + random) >> 16).to(tl.uint16)
    high = tl.where(x == x, high, 0x7FC0).to(tl.uint16)
    return high.to(tl.bfloat16, bitcast=True)


@triton.jit
def decode(raw, scale, SIGNED: tl.constexpr, REAL: tl.constexpr):
    """A moment or the curvature, plain or of 8-bit codes and the scale of each."""
    if raw.dtype == tl.uint8:
        code = raw.to(tl.uint32)
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
        return raw.to(REAL)


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
def join(raw, remainder, REAL: tl.constexpr):
    """A parameter; bfloat16 with a remainder (of int16) is a float32."""
    if remainder.dtype != tl.int16:
        return raw.to(REAL)
    else:
        high = raw.to(tl.uint16, bitcast=True).to(tl.uint32)
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
