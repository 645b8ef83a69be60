"""Launch the Triton kernels of the anchored updates: one update launch per kind of tensor."""

# ruff: noqa: SIM300

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastkernels.ops.update.call import UpdateCall
from fastkernels.ops.update.device_plan import DEVICE_PLANS, flag
from fastkernels.ops.update.plan import DTYPES
from fastkernels.ops.update.signature import ALIGNMENT
from fastkernels.ops.update.triton.kernels import (
    WIDTH,
    clip_kernel,
    finish_kernel,
    gradient_norm_kernel,
    update_kernel,
)
from fastkernels.ops.update.triton.rules import apply_adamw, apply_sgd, derive_adamw, derive_sgd

# Four elements per thread: 128-bit accesses of float32. ptxas takes up to 96 registers, and fits
# them into 64 without a spill when asked: 4 programs of 256 threads then share a multiprocessor.
BLOCK = 1024
REGISTERS = 64
# What would spill at 64 registers has half the threads: 8-bit codes and remainders take 72, with
# which 7 programs share a multiprocessor, and float64 as many as it needs.
HEAVY_BLOCK, HEAVY_REGISTERS = 512, 72
REDUCE, WARPS = 1024, 8  # block and warps of the kernels before and after the update
_TYPES = [dtype and getattr(tl, str(dtype).removeprefix("torch.")) for dtype in DTYPES]
RULES = {
    "anchored_adamw_": {"DERIVE": derive_adamw, "APPLY": apply_adamw},
    "anchored_sgd_": {"DERIVE": derive_sgd, "APPLY": apply_sgd},
}


class Kind(NamedTuple):
    """What the update kernel is compiled for: the types of parameter, gradient, two moments, anchor
    and curvature (None: absent), whether there are remainders, alignment, and block."""

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
        """The options of the compiler."""
        options = {"num_warps": self.BLOCK // (32 * WIDTH.value)}
        if self.REAL == tl.float32:
            options["maxnreg"] = REGISTERS if self.BLOCK == BLOCK else HEAVY_REGISTERS
        return options


def kind_of(types: bytes, remainder: bool, is_aligned: bool) -> Kind:
    """The kind of a row."""
    p, g, m, v, a, f = (_TYPES[t] for t in types)
    if a is None:  # without an anchor there is nothing for the curvature to weigh
        f = None
    real = tl.float64 if p == tl.float64 else tl.float32
    heavy = remainder or real == tl.float64 or tl.uint8 in (m, v, f)
    return Kind(
        P=p, G=g, M=m, V=v, A=a, F=f, REMAINDER=remainder, REAL=real,
        ALIGN=ALIGNMENT if is_aligned else 1, BLOCK=HEAVY_BLOCK if heavy else BLOCK,
    )  # fmt: skip


def run(call: UpdateCall) -> None:
    """Step `call` in place."""
    what = kind_of, call.seed, call.max_grad_norm
    plan, call, addresses, finish = DEVICE_PLANS.find(call, *what)
    device = call.params[0].device
    grad_scale = flag(call.grad_scale, device)
    found_inf = flag(call.found_inf, device)
    hyper = call.hyper.to(device)
    grads = plan.upload(addresses)
    clip = call.max_grad_norm is not None
    chunk_count = plan.partial.shape[1]
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        if clip:
            for launch in plan.launches:
                gradient_norm_kernel[(launch.count,)](
                    grads, plan.chunks, launch.first, plan.partial, G=launch.kind.G,
                    ALIGN=launch.kind.ALIGN, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
            clip_kernel[(1,)](
                plan.partial, chunk_count, plan.max_norm, plan.control,
                grad_scale, found_inf, BLOCK=REDUCE, num_warps=WARPS,
            )  # fmt: skip
        for launch in plan.launches:
            update_kernel[(launch.count,)](
                plan.rows, grads, plan.chunks, launch.first, chunk_count, hyper,
                plan.seed, plan.control, grad_scale, found_inf, plan.partial,
                **RULES[call.rule.name], COLUMNS=len(call.rule.columns),
                **launch.kind._asdict(), CLIP=clip, STATS=call.stats is not None,
                **launch.kind.options,
            )  # fmt: skip
        finish_kernel[(1,)](
            plan.rows, len(call.params), plan.partial, chunk_count, plan.control,
            grad_scale, found_inf, call.stats, CLIP=clip, BLOCK=REDUCE, num_warps=WARPS,
        )  # fmt: skip
    finish()
