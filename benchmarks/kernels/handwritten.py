"""What people write today for a pull to the pretrained weights, around torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.methods import Method, passes, torch_adamw
from benchmarks.kernels.tensors import ANCHOR_DECAY, LR, MAX_NORM, STEPS_DONE, Tensors, Update

Build = Callable[[Tensors, torch.optim.Optimizer, Update], Callable[[], object]]


def user(update: Update, build: Build) -> Callable[[Tensors], Method]:
    def make(tensors: Tensors) -> Method:
        opt = torch_adamw(tensors, fused=True)

        def reset() -> None:
            for p in tensors.params:
                opt.state[p]["step"].fill_(STEPS_DONE)

        return Method(
            step=build(tensors, opt, update),
            update=update,
            passes=passes(tensors, update),
            reset=reset,
        )

    return make


def penalty(a: Tensors, opt: torch.optim.Optimizer, update: Update) -> Callable[[], object]:
    """The penalty as part of the loss: autograd brings its gradient."""

    def step() -> None:
        terms = []
        for p, w0, f in zip(a.params, a.anchors, a.curvature, strict=True):
            squares = (p - w0).square()
            terms.append((f * squares if update.curvature else squares).sum())
        (0.5 * update.coupling * torch.stack(terms).sum()).backward()
        opt.step()

    return step


def on_gradients(a: Tensors, opt: torch.optim.Optimizer, update: Update) -> Callable[[], object]:
    """The penalty's gradient added by foreach operations."""

    @torch.no_grad()
    def step() -> None:
        away = torch._foreach_sub(a.values, a.anchors)
        if update.curvature:
            torch._foreach_mul_(away, a.curvature)
        torch._foreach_add_(a.grads, away, alpha=update.coupling)
        opt.step()

    return step


def decoupled(a: Tensors, opt: torch.optim.Optimizer, update: Update) -> Callable[[], object]:
    """The pull beside the step, as weight decay is in AdamW."""

    @torch.no_grad()
    def step() -> None:
        if not update.curvature:
            opt.step()
            torch._foreach_lerp_(a.values, a.anchors, LR * ANCHOR_DECAY)
            return
        away = torch._foreach_sub(a.values, a.anchors)
        torch._foreach_mul_(away, a.curvature)
        opt.step()
        torch._foreach_add_(a.values, away, alpha=-LR * ANCHOR_DECAY)

    return step


def whole(update_norm: bool) -> Build:
    """Clip, decoupled EWC and the norms, as a training loop that watches itself does."""

    def build(a: Tensors, opt: torch.optim.Optimizer, update: Update) -> Callable[[], object]:
        pull = decoupled(a, opt, update)

        @torch.no_grad()
        def step() -> list[torch.Tensor]:
            figures = [torch.nn.utils.clip_grad_norm_(a.params, MAX_NORM, foreach=True)]
            old = [w.clone() for w in a.values] if update_norm else None
            pull()
            for other in (a.anchors, old):
                if other is not None:
                    norms = torch._foreach_norm(torch._foreach_sub(a.values, other))
                    figures.append(torch.linalg.vector_norm(torch.stack(norms)))
            return figures

        return step

    return build


COUPLED, EXPLICIT = Update(pull="coupled"), Update(pull="explicit", curvature=True)
COUPLED_EWC = Update(pull="coupled", curvature=True)
FULL = Update(pull="explicit", curvature=True, clip=True)
USERS = {
    "user: L2-SP in the loss": user(COUPLED, penalty),
    "user: EWC in the loss": user(COUPLED_EWC, penalty),
    "user: L2-SP on gradients, foreach": user(COUPLED, on_gradients),
    "user: EWC on gradients, foreach": user(COUPLED_EWC, on_gradients),
    "user: decoupled L2-SP, foreach": user(Update(pull="lerp"), decoupled),
    "user: decoupled EWC, foreach": user(EXPLICIT, decoupled),
    "user: clip + EWC + drift": user(FULL, whole(update_norm=False)),
    "user: clip + EWC + drift + update norm": user(FULL, whole(update_norm=True)),
}
