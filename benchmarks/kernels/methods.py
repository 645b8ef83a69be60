"""The ways to make one step that are timed beside each other, each with what it must compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fast
from benchmarks.kernels.tensors import (
    ANCHOR_DECAY,
    BETAS,
    EPS,
    LR,
    MAX_NORM,
    STEPS_DONE,
    WEIGHT_DECAY,
    Tensors,
    Update,
)

# One pass over memory: lists of tensors parallel to the parameters, and whether they are written.
Pass = list[tuple[list[Tensor], bool]]
COMMON: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


PLAIN = Update()


class Missing(Exception):
    """A peer is not installed; the message says so."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to make one step.

    Attributes:
        step: makes it.
        update: what it computes.
        passes: the memory that `update` has to touch, for the floor.
        tolerance: the largest error of a weight after one step, as a share of lr.
        reset: restores the method's own state, after the tensors were refreshed.
        check: takes the true norm of the gradients and compares what the step reported.
    """

    step: Callable[[], object]
    update: Update = PLAIN
    passes: list[Pass]
    tolerance: float = 1e-3
    reset: Callable[[], object] = lambda: None
    check: Callable[[float], None] = lambda grad_norm: None


def passes(
    tensors: Tensors, update: Update, state: dict[str, list[Tensor]] | None = None
) -> list[Pass]:
    """The least that has to be read and written for `update`, with `state` in its own storage."""
    lists = {
        "exp_avg": tensors.exp_avgs,
        "exp_avg_sq": tensors.exp_avg_sqs,
        "anchor": tensors.anchors,
        "curvature": tensors.curvature,
    } | (state or {})
    main: Pass = [(tensors.values, True), (tensors.grads, False)]
    main += [(lists["exp_avg"], True), (lists["exp_avg_sq"], True)]
    if update.pull != "none":
        main.append((lists["anchor"], False))
    if update.curvature:
        main.append((lists["curvature"], False))
    # The exact global norm is known only after all gradients were read.
    return [[(tensors.grads, False)], main] if update.clip else [main]


def ours(
    update: Update, tolerance: float = 1e-3, **storage: torch.dtype
) -> Callable[[Tensors], Method]:
    def make(tensors: Tensors) -> Method:
        pull = {"anchor_decay": ANCHOR_DECAY} if update.pull != "none" else {}
        clip = {"max_grad_norm": MAX_NORM} if update.clip else {}
        opt = fast.AdamW(tensors.params, **COMMON, **pull, **clip, **storage)  # type: ignore[arg-type]
        groups = opt.state_dict()["param_groups"]

        def reset() -> None:
            state: dict[int, dict[str, Tensor]] = tensors.state()
            for i, s in state.items():
                if pull:
                    s["anchor"] = tensors.anchors[i]
                if update.curvature:
                    s["curvature"] = tensors.curvature[i]
            opt.load_state_dict({"state": state, "param_groups": groups})

        def check(grad_norm: float) -> None:
            reported = opt.stats()["grad_norm"].item()
            assert abs(reported - grad_norm) < 1e-5 * grad_norm, (reported, grad_norm)

        reset()
        keys = opt.state[tensors.params[0]].keys()
        state = {
            key.removesuffix("_codes"): [opt.state[p][key] for p in tensors.params]
            for key in keys
            if key != "step" and not key.endswith("_scales")
        }
        return Method(
            step=opt.step,
            update=update,
            passes=passes(tensors, update, state),
            tolerance=tolerance,
            reset=reset,
            check=check,
        )

    return make


def torch_adamw(tensors: Tensors, **how: bool) -> torch.optim.AdamW:
    opt = torch.optim.AdamW(tensors.params, **COMMON, **how)  # type: ignore[arg-type]
    opt.load_state_dict(
        {"state": tensors.state(), "param_groups": opt.state_dict()["param_groups"]}
    )
    return opt


def torch_method(opt: torch.optim.AdamW, tensors: Tensors, step: Callable[[], object]) -> Method:
    """A method with torch's state, whose `step` counter has to be set back."""

    def reset() -> None:
        for p in tensors.params:
            opt.state[p]["step"].fill_(STEPS_DONE)

    return Method(step=step, passes=passes(tensors, PLAIN), reset=reset)


def torchs(**how: bool) -> Callable[[Tensors], Method]:
    def make(tensors: Tensors) -> Method:
        opt = torch_adamw(tensors, **how)
        return torch_method(opt, tensors, opt.step)

    return make


def torch_compile(tensors: Tensors) -> Method:
    """torch.compile of torch's foreach step; compiling takes minutes."""
    if len(tensors.params) > 1000:
        raise Missing("compiling a step of so many tensors takes more than eight minutes")
    opt = torch_adamw(tensors, foreach=True)
    step = torch.compile(opt.step)
    return torch_method(opt, tensors, lambda: step())


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Missing(f"{module} is not installed; pip install '.[bench]'")
