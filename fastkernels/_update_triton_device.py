"""Device functions of the anchored updates in Triton: tables, storage forms, the pull, the norms.

Storage is that of csrc/include/fast/numeric.h, to the bit. What is absent (a type of None) is a
branch of the compiler, not of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels import _update, _update_tables

CODE_BLOCK = tl.constexpr(_update.CODE_BLOCK)
# Columns of the table of rows, in words of 8 bytes.
WORDS = tl.constexpr(_update_tables.WORDS)
STEP = tl.constexpr(_update_tables.STEP)
GROUP = tl.constexpr(_update_tables.GROUP)
HYPER = tl.constexpr(7)

ONE = tl.constexpr(0x3F800000)
UNSIGNED_TOP = tl.constexpr(4026531839.0)
SIGNED_TOP = tl.constexpr(61439.0)


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
def sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def gradient_scale(control, grad_scale, found_inf, CLIP: tl.constexpr):
    """(what gradients are multiplied by, float64; whether the step is skipped)."""
    if CLIP:
        return tl.load(control + 1), tl.load(control + 2) != 0
    else:
        scale = tl.full((), 1.0, tl.float64)
        skip = scale == 0
        if grad_scale is not None:
            scale = scale / tl.load(grad_scale).to(tl.float64)
        if found_inf is not None:
            skip = tl.load(found_inf) != 0
        return scale, skip


@triton.jit
def chunk_of(chunks, slot):
    """(row, first element, number of elements) of csrc's Chunk."""
    begin = tl.load(chunks + 2 * slot)
    packed = tl.load(chunks + 2 * slot + 1)
    return packed & 0xFFFFFFFF, begin, (packed >> 32).to(tl.int32)


@triton.jit
def stream(table, row, begin, WORD: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a chunk of the stream in column WORD begins.

    The alignment has to be told after the cast and the offset: on the integer it is lost.
    """
    if TYPE is None:
        return None
    else:
        base = tl.load(table + row * WORDS + WORD).to(tl.pointer_type(TYPE)) + begin
        return tl.multiple_of(base, ALIGN)


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
def load_state(at, scales, o, keep, SIGNED: tl.constexpr, REAL: tl.constexpr):
    """A moment or the curvature, plain or of 8-bit codes with their scales."""
    stored = load(at, o, keep)
    if stored.dtype == tl.uint8:
        code = stored.to(tl.uint32)
        y = code
        if SIGNED:
            y = code & 0x7F
        y = ((y << 20) + ONE).to(tl.float32, bitcast=True) - 1.0
        y = y * load(scales, o // CODE_BLOCK, keep)
        if SIGNED:
            y = (y.to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
        return y.to(REAL)
    else:
        return stored.to(REAL)


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
    scale = tl.where(most < 0x7F800000, tl.div_rn(largest, tl.full((BLOCKS,), top, tl.float32)),
                     float("nan"))  # fmt: skip
    inverse = tl.where(largest > 0, tl.div_rn(tl.full((BLOCKS,), top, tl.float32), largest), 0.0)
    first = tl.reshape(o, (BLOCKS, CODE_BLOCK))
    block = tl.min(first, axis=1) // CODE_BLOCK
    if keep is None:
        tl.store(scales + block, scale)
    else:
        tl.store(scales + block, scale, mask=tl.max(
            tl.reshape(keep.to(tl.int32), (BLOCKS, CODE_BLOCK)), axis=1) != 0)  # fmt: skip
    inverse = tl.broadcast_to(inverse[:, None], (BLOCKS, CODE_BLOCK))
    y = tl.abs(x) * tl.reshape(inverse, (BLOCKS * CODE_BLOCK,))
    code = ((y + 1.0).to(tl.uint32, bitcast=True) - ONE + random) >> 20
    if SIGNED:
        code = tl.minimum(code, 127) | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    else:
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
        x = value.to(tl.float32)
        up = ((x.to(tl.uint32, bitcast=True) + (draw & 0xFFFF)) >> 16).to(tl.uint16)
        up = tl.where(x == x, up, tl.full(up.shape, 0x7FC0, tl.uint16))
        store(at, o, keep, up.to(tl.bfloat16, bitcast=True))
    else:
        store(at, o, keep, value.to(TYPE))


@triton.jit
def load_param(at, remainders, o, keep, REAL: tl.constexpr):
    """A parameter; bfloat16 with remainders is a float32."""
    stored = load(at, o, keep)
    if remainders is None:
        return stored.to(REAL)
    else:
        high = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        low = load(remainders, o, keep).to(tl.int32).to(tl.uint32, bitcast=True)
        return (high + low).to(tl.float32, bitcast=True)


@triton.jit
def store_param(at, remainders, o, keep, value):
    if remainders is None:
        store(at, o, keep, value.to(at.dtype.element_ty))
    else:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits, 0x7FC00000)
        high = (bits + 0x8000) >> 16
        low = (bits - (high << 16)).to(tl.int32, bitcast=True).to(tl.int16)
        store(at, o, keep, high.to(tl.uint16).to(tl.bfloat16, bitcast=True))
        store(remainders, o, keep, low)


@triton.jit
def pull_to(w, w0, c):
    """The proximal step of c/2 (w - w0)^2, in the form that is exact at c = 0 and at w = w0."""
    return tl.fma(divide(c, 1 + c) + tl.zeros_like(w), w0 - w, w)


@triton.jit
def add(total, x, keep, WIDTH: tl.constexpr):
    """`total` [BLOCK / WIDTH] plus x [BLOCK], a thread's own elements first: a register per thread
    and norm instead of WIDTH."""
    if keep is not None:
        x = tl.where(keep, x, 0.0)
    return total + tl.sum(tl.reshape(x, (x.shape[0] // WIDTH, WIDTH)), axis=1)


@triton.jit
def update_tile(
    APPLY: tl.constexpr, rule, streams, sums, o, keep, key, begin,
    REAL: tl.constexpr, CLIP: tl.constexpr, STATS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a chunk: their part of the four sums is added and returned."""
    p, remainder, g, m, m_scale, v, v_scale, a, f, f_scale = streams
    squares, drift, change, forgetting = sums
    grad_scale, pull = rule[0], rule[1]
    old = load_param(p, remainder, o, keep, REAL)
    grad = load(g, o, keep).to(REAL) * grad_scale
    first = None
    second = None
    if m is not None:
        first = load_state(m, m_scale, o, keep, True, REAL)
    if v is not None:
        second = load_state(v, v_scale, o, keep, False, REAL)
    new, first, second = APPLY(rule, old, grad, first, second)
    if a is not None:
        w0 = load(a, o, keep).to(REAL)
        if f is not None:
            curvature = load_state(f, f_scale, o, keep, False, REAL)
            new = pull_to(new, w0, pull * curvature)
        else:
            new = pull_to(new, w0, pull)
    store_param(p, remainder, o, keep, new)
    if m is not None:
        store_state(m, m_scale, o, keep, first, key, begin, True)
    if v is not None:
        store_state(v, v_scale, o, keep, second, key, begin, False)
    if STATS:
        if not CLIP:
            squares = add(squares, grad * grad, keep, WIDTH)
        change = add(change, (new - old) * (new - old), keep, WIDTH)
        if a is not None:
            away = new - w0
            drift = add(drift, away * away, keep, WIDTH)
            if f is not None:
                forgetting = add(forgetting, curvature * away * away, keep, WIDTH)
    return squares, drift, change, forgetting


@triton.jit
def update_chunk(
    DERIVE: tl.constexpr, APPLY: tl.constexpr,
    table, grads, chunks, first_chunk, chunk_count, hyper, seed, control, grad_scale, found_inf,
    partial,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    F: tl.constexpr, REMAINDER: tl.constexpr, REAL: tl.constexpr, CLIP: tl.constexpr,
    STATS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor: all of a program."""
    slot = first_chunk + tl.program_id(0)
    scale, skip = gradient_scale(control, grad_scale, found_inf, CLIP)
    if not skip:
        row, begin, count = chunk_of(chunks, slot)
        step = tl.load(tl.load(table + row * WORDS + STEP).to(tl.pointer_type(tl.float32))) + 1
        group = tl.load(table + row * WORDS + GROUP).to(tl.int32)
        rule = DERIVE(hyper + group * HYPER, step, scale, REAL)
        key = rounding_key(tl.load(seed), step.to(tl.int32), begin)
        g = tl.load(grads + row).to(tl.pointer_type(G)) + begin
        streams = (
            stream(table, row, begin, 0, P, ALIGN),
            stream(table, row, begin, 9, tl.int16 if REMAINDER else None, ALIGN),
            tl.multiple_of(g, ALIGN),
            stream(table, row, begin, 2, M, ALIGN),
            stream(table, row, begin // CODE_BLOCK, 6, tl.float32 if M == tl.uint8 else None, 4),
            stream(table, row, begin, 3, V, ALIGN),
            stream(table, row, begin // CODE_BLOCK, 7, tl.float32 if V == tl.uint8 else None, 4),
            stream(table, row, begin, 4, A, ALIGN),
            stream(table, row, begin, 5, F, ALIGN),
            stream(table, row, begin // CODE_BLOCK, 8, tl.float32 if F == tl.uint8 else None, 4),
        )
        zero = tl.zeros((BLOCK // WIDTH,), REAL)
        sums = (zero, zero, zero, zero)
        # Only accesses without a mask are vectorised, so the ragged end is a tile of its own.
        whole = count // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            o = at + tl.arange(0, BLOCK)
            sums = update_tile(APPLY, rule, streams, sums, o, None, key, begin, REAL, CLIP, STATS,
                               WIDTH)  # fmt: skip
        if whole < count:
            o = whole + tl.arange(0, BLOCK)
            sums = update_tile(APPLY, rule, streams, sums, o, o < count, key, begin, REAL, CLIP,
                               STATS, WIDTH)  # fmt: skip
        if STATS:
            squares, drift, change, forgetting = sums
            if not CLIP:
                tl.store(partial + slot, tl.sum(squares, 0).to(tl.float64))
            tl.store(partial + chunk_count + slot, tl.sum(drift, 0).to(tl.float64))
            tl.store(partial + 2 * chunk_count + slot, tl.sum(change, 0).to(tl.float64))
            if F is None:
                forgetting = drift
            tl.store(partial + 3 * chunk_count + slot, tl.sum(forgetting, 0).to(tl.float64))
