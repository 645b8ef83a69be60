"""The ways to make one step that are timed beside each other; each knows what it must compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
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
    Arena,
    Job,
)

# One pass over memory: lists of tensors that run parallel to the parameters, and whether written.
Pass = list[tuple[list[Tensor], bool]]
COMMON: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


class Missing(Exception):
    """A peer is not installed; the message says so."""


@dataclass
class Method:
    """Attributes:
    step: makes one step.
    passes: the memory that its job has to touch, for the floor.
    tolerance: of a weight after one step, as a share of lr.
    reset: brings a state of its own back, after the arena was refreshed.
    """

    step: Callable[[], object]
    job: Job
    passes: list[Pass]
    tolerance: float = 1e-3
    reset: Callable[[], object] = lambda: None
    check: Callable[[float], None] = field(default=lambda grad_norm: None)


def passes(arena: Arena, job: Job, state: dict[str, list[Tensor]] | None = None) -> list[Pass]:
    """The least that has to be read and written for `job`, with `state` in its own storage."""
    stored = {
        "exp_avg": arena.exp_avgs,
        "exp_avg_sq": arena.exp_avg_sqs,
        "anchor": arena.anchors,
        "curvature": arena.curvature,
    } | (state or {})
    update: Pass = [(arena.values, True), (arena.grads, False)]
    update += [(stored["exp_avg"], True), (stored["exp_avg_sq"], True)]
    if job.pull != "none":
        update.append((stored["anchor"], False))
    if job.curvature:
        update.append((stored["curvature"], False))
    # The exact global norm is known only after all gradients were read.
    return [[(arena.grads, False)], update] if job.clip else [update]


def ours(job: Job, tolerance: float = 1e-3, **storage: torch.dtype) -> Callable[[Arena], Method]:
    def make(arena: Arena) -> Method:
        pull = {"anchor_decay": ANCHOR_DECAY} if job.pull != "none" else {}
        clip = {"max_grad_norm": MAX_NORM} if job.clip else {}
        opt = fast.AdamW(arena.params, **COMMON, **pull, **clip, **storage)  # type: ignore[arg-type]
        groups = opt.state_dict()["param_groups"]

        def reset() -> None:
            state: dict[int, dict[str, Tensor]] = arena.state()
            for i, s in state.items():
                if pull:
                    s["anchor"] = arena.anchors[i]
                if job.curvature:
                    s["curvature"] = arena.curvature[i]
            opt.load_state_dict({"state": state, "param_groups": groups})

        def check(grad_norm: float) -> None:
            found = opt.stats()["grad_norm"].item()
            assert abs(found - grad_norm) < 1e-5 * grad_norm, (found, grad_norm)

        reset()
        keys = opt.state[arena.params[0]].keys()
        state = {
            key.removesuffix("_codes"): [opt.state[p][key] for p in arena.params]
            for key in keys
            if key != "step" and not key.endswith("_scales")
        }
        found = passes(arena, job, state)
        return Method(opt.step, job, found, tolerance, reset, check)

    return make


def torch_adamw(arena: Arena, **how: bool) -> torch.optim.AdamW:
    opt = torch.optim.AdamW(arena.params, **COMMON, **how)
    opt.load_state_dict({"state": arena.state(), "param_groups": opt.state_dict()["param_groups"]})
    return opt


def torchs(**how: bool) -> Callable[[Arena], Method]:
    def make(arena: Arena) -> Method:
        opt = torch_adamw(arena, **how)

        def reset() -> None:
            for p in arena.params:
                opt.state[p]["step"].fill_(STEPS_DONE)

        return Method(opt.step, Job(), passes(arena, Job()), reset=reset)

    return make


def compiled(arena: Arena) -> Method:
    """torch.compile of torch's foreach step: minutes to compile."""
    if len(arena.params) > 1000:
        raise Missing("compiling a step of so many tensors takes more than eight minutes")
    opt = torch_adamw(arena, foreach=True)
    step = torch.compile(opt.step)

    def reset() -> None:
        for p in arena.params:
            opt.state[p]["step"].fill_(STEPS_DONE)

    return Method(lambda: step(), Job(), passes(arena, Job()), reset=reset)


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Missing(f"{module} is not installed; pip install '.[bench]'")
