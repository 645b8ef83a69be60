"""The tensors that every method works on, and the float64 truth of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.shapes import Shapes

LR, BETAS, EPS, WEIGHT_DECAY, ANCHOR_DECAY, MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 0.01, 10.0, 1.0
STEPS_DONE = 100
# About this many elements of every tensor are checked, at even distances.
CHECKED = 65536


def checked(t: Tensor) -> Tensor:
    return t.flatten()[:: max(1, t.numel() // CHECKED)]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a method computes.

    Attributes:
        pull: "none"; "proximal" (ours); "explicit": `w' - lr d F (w - w0)` with the old `w`;
            "lerp": the same at the new `w` and `F = 1`; or "coupled": `d F (w - w0)` is added to
            the gradient, with `coupling` in place of `d`.
    """

    pull: str = "none"
    curvature: bool = False
    clip: bool = False
    coupling: float = 0.1


class Tensors:
    """Parameters, gradients, moments, anchors and curvature in float32, shared by all methods."""

    def __init__(self, shapes: Shapes) -> None:
        def empty() -> list[Tensor]:
            return [torch.empty(shape) for shape in shapes]

        self.params = [torch.nn.Parameter(p) for p in empty()]
        self.values = [p.detach() for p in self.params]
        self.grads, self.exp_avgs, self.exp_avg_sqs = empty(), empty(), empty()
        self.anchors, self.curvature = empty(), empty()
        self.elements = sum(p.numel() for p in self.params)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Set everything back to its first value."""
        random = torch.Generator().manual_seed(0)
        for i, w in enumerate(self.values):
            w.normal_(0, 0.05, generator=random)
            self.anchors[i].normal_(0, 0.01, generator=random).add_(w)
            self.grads[i].normal_(0, 1e-3, generator=random)
            self.exp_avgs[i].normal_(0, 1e-3, generator=random)
            self.exp_avg_sqs[i].uniform_(0.5e-6, 1.5e-6, generator=random)
            self.curvature[i].uniform_(0, 1, generator=random)
        self.attach_grads()

    def attach_grads(self) -> None:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def state_of(self, i: int) -> dict[str, Tensor]:
        """The state of torch's AdamW after STEPS_DONE steps; the moments are not copied."""
        step = torch.tensor(float(STEPS_DONE))
        return {"step": step, "exp_avg": self.exp_avgs[i], "exp_avg_sq": self.exp_avg_sqs[i]}

    def state(self) -> dict[int, dict[str, Tensor]]:
        return {i: self.state_of(i) for i in range(len(self.params))}

    def grad_norm(self) -> float:
        return math.sqrt(sum(g.double().square().sum().item() for g in self.grads))

    def expected(self, update: Update) -> list[Tensor]:
        """float64 per parameter: its `checked` elements after one step."""
        scale = min(1.0, MAX_NORM / (self.grad_norm() + 1e-6)) if update.clip else 1.0
        (beta1, beta2), t = BETAS, STEPS_DONE + 1
        result = []
        for i in range(len(self.values)):
            w, g, m, v, w0, f = (
                checked(x[i]).double()
                for x in (self.values, self.grads, self.exp_avgs, self.exp_avg_sqs,
                          self.anchors, self.curvature)
            )  # fmt: skip
            f = f if update.curvature else torch.ones_like(f)
            g = g * scale
            if update.pull == "coupled":
                g = g + update.coupling * f * (w - w0)
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
            denominator = (v / (1 - beta2**t)).sqrt() + EPS
            u = w * (1 - LR * WEIGHT_DECAY) - LR * m / (1 - beta1**t) / denominator
            c = LR * ANCHOR_DECAY * f
            if update.pull == "proximal":
                u = (u + c * w0) / (1 + c)
            elif update.pull == "explicit":
                u = u - c * (w - w0)
            elif update.pull == "lerp":
                u = u + c * (w0 - u)
            result.append(u)
        return result
