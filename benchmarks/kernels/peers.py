"""Other libraries' AdamW; each skips with a reason where it is not installed."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.kernels.methods import COMMON, Method, need, passes
from benchmarks.kernels.tensors import STEPS_DONE, Arena, Job

EIGHT_BIT = 0.3  # of lr: what codes of 8 bits cost in one step


def deepspeed(arena: Arena) -> Method:
    need("deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    opt = DeepSpeedCPUAdam(arena.params, **COMMON, adamw_mode=True)

    def reset() -> None:
        for i, p in enumerate(arena.params):
            opt.state[p] = arena.state_of(i) | {"step": STEPS_DONE}

    reset()
    return Method(opt.step, Job(), passes(arena, Job()), reset=reset)


def torchao(name: str, tolerance: float) -> Any:
    def make(arena: Arena) -> Method:
        need("torchao")
        import torchao.optim

        opt = getattr(torchao.optim, name)(arena.params, **COMMON)
        stored = {}
        if "8bit" in name:
            codes = [torch.zeros_like(w, dtype=torch.uint8) for w in arena.values]
            stored = {"exp_avg": codes, "exp_avg_sq": codes}
        return _with_copied_state(arena, opt, tolerance, stored)

    return make


def bitsandbytes(bits: int, tolerance: float) -> Any:
    def make(arena: Arena) -> Method:
        need("bitsandbytes")
        import bitsandbytes as bnb

        opt = bnb.optim.AdamW(arena.params, **COMMON, optim_bits=bits)
        return _with_copied_state(arena, opt, tolerance)

    return make


def _with_copied_state(
    arena: Arena, opt: Any, tolerance: float, stored: dict[str, list[torch.Tensor]] | None = None
) -> Method:
    """These make their own state at the first step; its values are then the arena's.

    Args:
        stored: tensors of the size of moments that are not float32.
    """
    with torch.no_grad():
        opt.step()
    first = {id(p): dict(opt.state[p]) for p in arena.params}

    def reset() -> None:
        for i, p in enumerate(arena.params):
            state, start = first[id(p)], arena.state_of(i)
            for theirs, name in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
                key = theirs if theirs in state else name
                state[key].copy_(start[name])
            step = state["step"]
            state["step"] = step.fill_(STEPS_DONE) if torch.is_tensor(step) else STEPS_DONE
            opt.state[p].update(state)

    return Method(opt.step, Job(), passes(arena, Job(), stored), tolerance, reset)
