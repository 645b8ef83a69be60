"""The Triton kernels of the anchored updates.

1. With clipping, `gradient_norm_kernel` reads the gradients, and `clip_kernel` makes of its sums
   the norm, the scale of the gradients, and whether the step is skipped.
2. `update_kernel` is a program per chunk of 16384 elements.
3. `finish_kernel` makes the four figures from the chunks' sums, and advances the step counts.

Every sum is in fixed order; nothing is read by the host. Hyper-parameters, loss scale and found_inf
are read from device memory, so a captured graph follows them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: SIM300

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels.ops.update.call import STATS as FIGURES
from fastkernels.ops.update.plan import ROW
from fastkernels.ops.update.triton.forms import (
    CODE_BLOCK,
    decode,
    join,
    load,
    rounding_key,
    store_param,
    store_state,
)
from fastkernels.ops.update.triton.rules import pull_to

# Consecutive elements of a thread: 128-bit accesses of float32.
WIDTH = tl.constexpr(4)
WORDS = tl.constexpr(len(ROW))
# A constexpr_function may look up, but not call `index`.
WORD_OF = {field: k for k, field in enumerate(ROW)}
FIGURE_OF = {name: k for k, name in enumerate(FIGURES)}


@triton.constexpr_function
def word(field):
    """The column of `field` in the table of rows."""
    return WORD_OF[field]


@triton.constexpr_function
def figure(name):
    """The row of `name` in the chunks' sums, and its place in `stats`."""
    return FIGURE_OF[name]


@triton.jit
def gradient_scale(
    control,  # float64 [3]: gradient norm, what gradients are multiplied by, skip
    grad_scale,  # float32 or float64 [1], or None
    found_inf,  # float32 or float64 [1], or None
    CLIP: tl.constexpr,
):  # fmt: skip
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
def chunk_of(
    chunks,  # int64 [chunks, 2]
    slot,
):  # fmt: skip
    """(row, first element, number of elements) of csrc's Chunk."""
    begin = tl.load(chunks + 2 * slot)
    packed = tl.load(chunks + 2 * slot + 1)
    return packed & 0xFFFFFFFF, begin, (packed >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["first_chunk"])
def gradient_norm_kernel(
    grads,  # int64 [N], addresses
    chunks,  # int64 [chunks, 2]
    first_chunk,
    partial,  # float64 [4, chunks], row 0 is written
    G: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
def sum_of(
    partial,  # float64 [count]
    count, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, count, BLOCK):
        o = at + tl.arange(0, BLOCK)
        total += tl.load(partial + o, mask=o < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["chunk_count"])
def clip_kernel(
    partial,  # float64 [4, chunk_count], row 0 is read
    chunk_count,
    max_norm,  # float64 [1]
    control,  # float64 [3], written
    grad_scale,  # float32 or float64 [1], or None
    found_inf,  # float32 or float64 [1], or None
    BLOCK: tl.constexpr,
):  # fmt: skip
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
    rows,  # int64 [row_count, 14]
    row_count,
    partial,  # float64 [4, chunk_count]
    chunk_count,
    control,  # float64 [3]
    grad_scale,  # float32 or float64 [1], or None
    found_inf,  # float32 or float64 [1], or None
    stats,  # float64 [4], written, or None
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A single program, after the update: nothing else reads or writes the step counts then."""
    _, skip = gradient_scale(control, grad_scale, found_inf, CLIP)
    if not skip:
        for at in range(0, row_count, BLOCK):
            o = at + tl.arange(0, BLOCK)
            keep = o < row_count
            address = tl.load(rows + o.to(tl.int64) * WORDS + word("step"), mask=keep, other=0)
            step = address.to(tl.pointer_type(tl.float32))
            tl.store(step, tl.load(step, mask=keep, other=0.0) + 1, mask=keep)
        if stats is not None:
            if CLIP:
                tl.store(stats, tl.load(control))
            else:
                tl.store(stats, tl.sqrt(sum_of(partial, chunk_count, BLOCK)))
            drift = sum_of(partial + figure("drift") * chunk_count, chunk_count, BLOCK)
            change = sum_of(partial + figure("update_norm") * chunk_count, chunk_count, BLOCK)
            forgetting = sum_of(partial + figure("forgetting") * chunk_count, chunk_count, BLOCK)
            tl.store(stats + figure("drift"), tl.sqrt(drift))
            tl.store(stats + figure("update_norm"), tl.sqrt(change))
            tl.store(stats + figure("forgetting"), 0.5 * forgetting)


@triton.jit
def stream(
    row,  # int64 [14]
    begin, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Where a chunk of the stream in FIELD begins.

    The alignment is stated after the cast and the offset: on the integer it would be lost.
    """
    base = tl.load(row + word(FIELD)).to(tl.pointer_type(TYPE)) + begin
    return tl.multiple_of(base, ALIGN)


@triton.jit
def add(total, x, keep, PER_THREAD: tl.constexpr):
    """`total` [BLOCK / PER_THREAD] plus x [BLOCK]. The elements of a thread are added first: a norm
    takes one register per thread instead of PER_THREAD."""
    if keep is not None:
        x = tl.where(keep, x, 0.0)
    return total + tl.sum(tl.reshape(x, (x.shape[0] // PER_THREAD, PER_THREAD)), axis=1)


@triton.jit
def update_tile(
    APPLY: tl.constexpr, rule, streams, sums, at, o, count, keep, key,
    REAL: tl.constexpr, CLIP: tl.constexpr, STATS: tl.constexpr, PER_THREAD: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a chunk: their part of the four sums is added and returned."""
    p, remainder, g, m, m_scale, v, v_scale, a, f, f_scale = streams
    squares, drift, change, forgetting = sums
    grad_scale, pull = rule[0], rule[1]
    # Every load comes before any arithmetic, so that all are under way together. Where a stream is
    # absent, a stand-in: Triton 3.6 cannot return None from functions.
    raw_p, raw_g = load(p, o, keep), load(g, o, keep)
    low, raw_m, raw_v, raw_a, raw_f = (raw_g,) * 5
    scale_m, scale_v, scale_f = (raw_g,) * 3
    if remainder is not None:
        low = load(remainder, o, keep)
    if m is not None:
        raw_m = load(m, o, keep)
    if v is not None:
        raw_v = load(v, o, keep)
    if a is not None:
        raw_a = load(a, o, keep)
    if f is not None:
        raw_f = load(f, o, keep)
    if m_scale is not None:
        scale_m = load(m_scale, o // CODE_BLOCK, keep)
    if v_scale is not None:
        scale_v = load(v_scale, o // CODE_BLOCK, keep)
    if f_scale is not None:
        scale_f = load(f_scale, o // CODE_BLOCK, keep)
    old = join(raw_p, low, REAL)
    grad = raw_g.to(REAL) * grad_scale
    first, second = grad, grad
    if m is not None:
        first = decode(raw_m, scale_m, True, REAL)
    if v is not None:
        second = decode(raw_v, scale_v, False, REAL)
    new, first, second = APPLY(rule, old, grad, first, second, m is not None)
    if a is not None:
        w0 = raw_a.to(REAL)
        if f is not None:
            curvature = decode(raw_f, scale_f, False, REAL)
            new = pull_to(new, w0, pull * curvature)
        else:
            new = pull_to(new, w0, pull)
    store_param(p, remainder, o, keep, new)
    if m is not None:
        store_state(m, m_scale, at, o, count, keep, first, key, True)
    if v is not None:
        store_state(v, v_scale, at, o, count, keep, second, key, False)
    if STATS:
        if not CLIP:
            squares = add(squares, grad * grad, keep, PER_THREAD)
        change = add(change, (new - old) * (new - old), keep, PER_THREAD)
        if a is not None:
            away = new - w0
            drift = add(drift, away * away, keep, PER_THREAD)
            if f is not None:
                forgetting = add(forgetting, curvature * away * away, keep, PER_THREAD)
    return squares, drift, change, forgetting


@triton.constexpr_function
def tail_block(threads, codes):
    """An element per thread; codes are scaled by whole blocks."""
    return max(threads, CODE_BLOCK.value) if codes else threads


@triton.jit(do_not_specialize=["first_chunk", "chunk_count"])
def update_kernel(
    rows,  # int64 [N, 14]
    grads,  # int64 [N], addresses
    chunks,  # int64 [chunks, 2]
    first_chunk, chunk_count,
    hyper,  # float64 [G, COLUMNS]
    seed,  # int64 [1]
    control,  # float64 [3], of clip_kernel
    grad_scale,  # float32 or float64 [1], or None
    found_inf,  # float32 or float64 [1], or None
    partial,  # float64 [4, chunks], written
    DERIVE: tl.constexpr, APPLY: tl.constexpr, COLUMNS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    F: tl.constexpr, REMAINDER: tl.constexpr, REAL: tl.constexpr, CLIP: tl.constexpr,
    STATS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor; DERIVE and APPLY are the rule."""
    slot = first_chunk + tl.program_id(0)
    scale, skip = gradient_scale(control, grad_scale, found_inf, CLIP)
    if not skip:
        index, begin, count = chunk_of(chunks, slot)
        row = rows + index * WORDS
        step = tl.load(tl.load(row + word("step")).to(tl.pointer_type(tl.float32))) + 1
        group = tl.load(row + word("group")).to(tl.int32)
        rule = DERIVE(hyper + group * COLUMNS, step, scale, REAL)
        key = rounding_key(tl.load(seed), step.to(tl.int32), begin)
        g = tl.load(grads + index).to(tl.pointer_type(G)) + begin
        # Not inside of `stream`: Triton 3.6 cannot return None.
        block = begin // CODE_BLOCK
        streams = (
            stream(row, begin, "param", P, ALIGN),
            stream(row, begin, "remainder", tl.int16, ALIGN) if REMAINDER else None,
            tl.multiple_of(g, ALIGN),
            stream(row, begin, "moment[0]", M, ALIGN) if M is not None else None,
            stream(row, block, "scale[0]", tl.float32, 4) if M == tl.uint8 else None,
            stream(row, begin, "moment[1]", V, ALIGN) if V is not None else None,
            stream(row, block, "scale[1]", tl.float32, 4) if V == tl.uint8 else None,
            stream(row, begin, "anchor", A, ALIGN) if A is not None else None,
            stream(row, begin, "curvature", F, ALIGN) if F is not None else None,
            stream(row, block, "curvature_scale", tl.float32, 4) if F == tl.uint8 else None,
        )
        zero = tl.zeros((BLOCK // WIDTH,), REAL)
        sums = (zero, zero, zero, zero)
        # Only accesses without a mask are vectorised; the ragged end has smaller tiles, which keep
        # its many addresses out of the registers.
        TAIL: tl.constexpr = tail_block(BLOCK // WIDTH, M == tl.uint8 or V == tl.uint8)
        whole = count // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            o = at + tl.arange(0, BLOCK)
            sums = update_tile(APPLY, rule, streams, sums, at, o, count, None, key, REAL,
                               CLIP, STATS, WIDTH)  # fmt: skip
        for at in range(whole, count, TAIL):
            o = at + tl.arange(0, TAIL)
            sums = update_tile(APPLY, rule, streams, sums, at, o, count, o < count, key, REAL,
                               CLIP, STATS, TAIL * WIDTH // BLOCK)  # fmt: skip
        if STATS:
            squares, drift, change, forgetting = sums
            if not CLIP:  # else it is there already
                tl.store(partial + slot, tl.sum(squares, 0).to(tl.float64))
            sums_at = partial + slot
            tl.store(sums_at + figure("drift") * chunk_count, tl.sum(drift, 0).to(tl.float64))
            tl.store(
                sums_at + figure("update_norm") * chunk_count, tl.sum(change, 0).to(tl.float64)
            )
            if F is None:
                forgetting = drift
            tl.store(
                sums_at + figure("forgetting") * chunk_count, tl.sum(forgetting, 0).to(tl.float64)
            )
