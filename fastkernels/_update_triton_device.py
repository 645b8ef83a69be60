"""One chunk of an anchored update in Triton: tables, hyper-parameters, the pull, the four sums.

What is absent (a type of None) is a branch of the compiler, not of the kernel.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: SIM300

from __future__ import annotations

import triton
import triton.language as tl

from fastkernels import _update, _update_tables
from fastkernels._update_triton_storage import (
    CODE_BLOCK,
    load,
    load_param,
    load_state,
    rounding_key,
    store_param,
    store_state,
)

# Columns of the table of rows, in words of 8 bytes.
WORDS = tl.constexpr(_update_tables.WORDS)
STEP = tl.constexpr(_update_tables.STEP)
GROUP = tl.constexpr(_update_tables.GROUP)
HYPER = tl.constexpr(7)
# Consecutive elements of a thread.
WIDTH = tl.constexpr(4)


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
    """csrc's: an infinite pull stays finite, so that a curvature of 0 takes it away."""
    c = lr * tl.where(anchor_decay > 1e30, 1e30, anchor_decay)
    return tl.where(c > 1e30, 1e30, c)


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
    base = tl.load(table + row * WORDS + WORD).to(tl.pointer_type(TYPE)) + begin
    return tl.multiple_of(base, ALIGN)


@triton.jit
def pull_to(w, w0, c):
    """The proximal step of c/2 (w - w0)^2, exact at c = 0 and at w = w0: from w on for a weak pull,
    and from w0 on for a strong one, where w may be so large that w0 is lost in it.

    Division and square root of float32 are the hardware's, within 2 units in the last place of the
    step (not of the weight): the correctly rounded ones need 8 more registers. The division gives 0
    above 2^126, where the pull is infinite.
    """
    strong = c > 1
    return tl.where(strong, w0, w) + tl.where(strong, -1.0, c) / (1 + c) * (w0 - w)


@triton.jit
def add(total, x, keep, OWN: tl.constexpr):
    """`total` [BLOCK / OWN] plus x [BLOCK], a thread's own elements first: a register per thread
    and norm instead of OWN."""
    if keep is not None:
        x = tl.where(keep, x, 0.0)
    return total + tl.sum(tl.reshape(x, (x.shape[0] // OWN, OWN)), axis=1)


@triton.jit
def update_tile(
    APPLY: tl.constexpr, rule, streams, sums, o, keep, key, begin,
    REAL: tl.constexpr, CLIP: tl.constexpr, STATS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a chunk: their part of the four sums is added and returned."""
    p, remainder, g, m, m_scale, v, v_scale, a, f, f_scale = streams
    squares, drift, change, forgetting = sums
    grad_scale, pull = rule[0], rule[1]
    old = load_param(p, remainder, o, keep, REAL)
    grad = load(g, o, keep).to(REAL) * grad_scale
    # Where there is no moment, a stand-in: Triton 3.6 cannot return None from APPLY.
    first, second = grad, grad
    if m is not None:
        first = load_state(m, m_scale, o, keep, True, REAL)
    if v is not None:
        second = load_state(v, v_scale, o, keep, False, REAL)
    new, first, second = APPLY(rule, old, grad, first, second, m is not None)
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
            squares = add(squares, grad * grad, keep, OWN)
        change = add(change, (new - old) * (new - old), keep, OWN)
        if a is not None:
            away = new - w0
            drift = add(drift, away * away, keep, OWN)
            if f is not None:
                forgetting = add(forgetting, curvature * away * away, keep, OWN)
    return squares, drift, change, forgetting


@triton.constexpr_function
def tail_block(threads, codes):
    """An element per thread; codes are scaled by whole blocks."""
    return max(threads, _update.CODE_BLOCK) if codes else threads


@triton.jit
def update_chunk(
    DERIVE: tl.constexpr, APPLY: tl.constexpr,
    table, grads, chunks, first_chunk, chunk_count, hyper, seed, control, grad_scale, found_inf,
    partial,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    F: tl.constexpr, REMAINDER: tl.constexpr, REAL: tl.constexpr, CLIP: tl.constexpr,
    STATS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
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
        # Not inside of `stream`: Triton 3.6 cannot return None.
        coded = begin // CODE_BLOCK
        streams = (
            stream(table, row, begin, 0, P, ALIGN),
            stream(table, row, begin, 9, tl.int16, ALIGN) if REMAINDER else None,
            tl.multiple_of(g, ALIGN),
            stream(table, row, begin, 2, M, ALIGN) if M is not None else None,
            stream(table, row, coded, 6, tl.float32, 4) if M == tl.uint8 else None,
            stream(table, row, begin, 3, V, ALIGN) if V is not None else None,
            stream(table, row, coded, 7, tl.float32, 4) if V == tl.uint8 else None,
            stream(table, row, begin, 4, A, ALIGN) if A is not None else None,
            stream(table, row, begin, 5, F, ALIGN) if F is not None else None,
            stream(table, row, coded, 8, tl.float32, 4) if F == tl.uint8 else None,
        )
        zero = tl.zeros((BLOCK // WIDTH,), REAL)
        sums = (zero, zero, zero, zero)
        # Only accesses without a mask are vectorised; the ragged end has smaller tiles, which keep
        # its many addresses out of the registers.
        TAIL: tl.constexpr = tail_block(BLOCK // WIDTH, M == tl.uint8 or V == tl.uint8)
        whole = count // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            o = at + tl.arange(0, BLOCK)
            sums = update_tile(APPLY, rule, streams, sums, o, None, key, begin, REAL, CLIP, STATS,
                               WIDTH)  # fmt: skip
        for at in range(whole, count, TAIL):
            o = at + tl.arange(0, TAIL)
            sums = update_tile(APPLY, rule, streams, sums, o, o < count, key, begin, REAL, CLIP,
                               STATS, TAIL * WIDTH // BLOCK)  # fmt: skip
        if STATS:
            squares, drift, change, forgetting = sums
            if not CLIP:
                tl.store(partial + slot, tl.sum(squares, 0).to(tl.float64))
            tl.store(partial + chunk_count + slot, tl.sum(drift, 0).to(tl.float64))
            tl.store(partial + 2 * chunk_count + slot, tl.sum(change, 0).to(tl.float64))
            if F is None:
                forgetting = drift
            tl.store(partial + 3 * chunk_count + slot, tl.sum(forgetting, 0).to(tl.float64))
