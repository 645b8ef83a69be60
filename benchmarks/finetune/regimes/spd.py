"""Selective projection decay (Tian et al. 2024, arXiv 2411.01713), as an Adam of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AdamSPD(torch.optim.Optimizer):
    """Adam that projects a tensor back towards where it started, when its gradient points there.

    With the step `w~ = w - lr * adam(g)`, and per tensor: where `g . (w - w0) > 0`, that is where
    descent leads back towards `w0`, `w' = w~ - decay * r * (w~ - w0)`, and else `w' = w~`. The
    ratio `r = max(0, (|w~ - w0| - |w - w0|) / |w~ - w0|)` is the share of the distance that the
    step has added; with `decay` 1 the step adds none.

    Args:
        params: groups; those named `head...` are not projected, having nothing to go back to.
        decay: the paper advises to begin with 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "decay": decay})
        self.anchors = {
            p: p.detach().clone()
            for group in self.param_groups
            if not group.get("name", "").startswith("head")
            for p in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        (beta1, beta2), steps = group["betas"], state["step"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
        mean = state["exp_avg"] / (1 - beta1**steps)
        variance = state["exp_avg_sq"] / (1 - beta2**steps)
        step = group["lr"] * mean / (variance.sqrt() + group["eps"])
        anchor = self.anchors.get(p)
        if anchor is None:
            p.sub_(step)
            return
        before = p - anchor
        after = before - step
        if (grad * before).sum() > 0 and (distance := after.norm()) > 0:
            ratio = ((distance - before.norm()) / distance).clamp(min=0)
            after = after - group["decay"] * ratio * after
        p.copy_(anchor + after)
