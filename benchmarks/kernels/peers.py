"""Other libraries' AdamW; each skips with a reason where it is not installed."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.kernels.methods import COMMON, Method, need, passes
from benchmarks.kernels.tensors import STEPS_DONE, Tensors, Update

Lists = dict[str, list[torch.Tensor]]
EIGHT_BIT = 0.3  # the error of codes of 8 bits in one step, as a share of lr


def deepspeed(tensors: Tensors) -> Method:
    need("deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    opt = DeepSpeedCPUAdam(tensors.params, **COMMON, adamw_mode=True)

    def reset() -> None:
        for i, p in enumerate(tensors.params):
            opt.state[p] = tensors.state_of(i) | {"step": STEPS_DONE}

    reset()
    return Method(step=opt.step, passes=passes(tensors, Update()), reset=reset)


def torchao(name: str, tolerance: float) -> Any:
    def make(tensors: Tensors) -> Method:
        need("torchao")
        import torchao.optim

        opt = getattr(torchao.optim, name)(tensors.params, **COMMON)
        moments = {}
        if "8bit" in name:
            codes = [torch.zeros_like(w, dtype=torch.uint8) for w in tensors.values]
            moments = {"exp_avg": codes, "exp_avg_sq": codes}
        return _with_copied_state(tensors, opt, tolerance, moments)

    return make


def bitsandbytes(bits: int, tolerance: float) -> Any:
    def make(tensors: Tensors) -> Method:
        need("bitsandbytes")
        import bitsandbytes as bnb

        opt = bnb.optim.AdamW(tensors.params, **COMMON, optim_bits=bits)
        return _with_copied_state(tensors, opt, tolerance)

    return make


def _with_copied_state(
    tensors: Tensors,
    opt: Any,
    tolerance: float,
    moments: Lists | None = None,
) -> Method:
    """A method that makes its own state at the first step; its values are then set to those of
    `tensors`.

    Args:
        moments: those of the library, where they are not float32.
    """
    with torch.no_grad():
        opt.step()
    first = {id(p): dict(opt.state[p]) for p in tensors.params}

    def reset() -> None:
        for i, p in enumerate(tensors.params):
            state, start = first[id(p)], tensors.state_of(i)
            for theirs, name in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
                key = theirs if theirs in state else name
                state[key].copy_(start[name])
            step = state["step"]
            state["step"] = step.fill_(STEPS_DONE) if torch.is_tensor(step) else STEPS_DONE
            opt.state[p].update(state)

    return Method(
        step=opt.step,
        passes=passes(tensors, Update(), moments),
        tolerance=tolerance,
        reset=reset,
    )
