"""Runs an update op, torch at the same dtype, and the float64 truth on the same data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastkernels
from fastkernels import codes as codec
from fastkernels.ops.update.adamw import ADAMW
from fastkernels.ops.update.sgd import SGD
from kernels.cases import Feature

LR = 0.01
RULES = {"adamw": ADAMW, "sgd": SGD}


@dataclass
class Run:
    """A list of tensors under one rule ("adamw", "sgd"), and what the op needs to step it."""

    rule: str
    params: list[Tensor]
    feature: Feature
    momentum: float = 0.9
    nesterov: bool = False
    moment_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        f = self.feature
        tail = [f.weight_decay, f.anchor_decay, float(f.maximize)]
        head = {"adamw": [LR, 0.9, 0.999, 1e-8], "sgd": [LR, self.momentum, 0.0, self.nesterov]}
        self.hyper = torch.tensor([head[self.rule] + tail], dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        self.anchors: list[Tensor | None] = []
        self.curvature: list[Tensor | None] = []
        for p in self.params:
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            f_ = torch.rand(p.shape, generator=generator).square() * 10
            self.anchors.append(p + 0.1 * noise)
            self.curvature.append(f_)
        count = 2 if self.rule == "adamw" else 1
        self.moments = []
        for k in range(count):
            dtype = self.moment_dtypes[k]
            absent = self.rule == "sgd" and not self.momentum
            self.moments.append(
                [
                    torch.empty(0) if absent else torch.zeros_like(p, dtype=dtype or state_dtype(p))
                    for p in self.params
                ]
            )
        self.scales = []
        for moments in self.moments:
            coded = any(m.dtype == torch.uint8 for m in moments)
            self.scales.append(
                [torch.zeros(codec.code_scales(m.numel())) for m in moments] if coded else []
            )
        self.steps = [torch.zeros(()) for _ in self.params]
        self.stats = torch.full((4,), torch.nan, dtype=torch.float64)

    def store(
        self,
        *,
        gradient: torch.dtype,
        anchor: torch.dtype,
        curvature: torch.dtype,
        split: bool,
    ) -> None:
        """Keep what a step reads in these dtypes.

        Args:
            curvature: uint8 for codes with their scales.
            split: parameters have remainders.
        """
        self.gradient_dtype = gradient
        self.anchors = [a.to(anchor) for a in self.anchors]
        if curvature == torch.uint8:
            coded = [codec.encode(f, codec.NEAREST, signed=False) for f in self.curvature]
            self.curvature = [codes for codes, _ in coded]
            self.options["curvature_scales"] = [scales for _, scales in coded]
        else:
            self.curvature = [f.to(curvature) for f in self.curvature]
        if split:
            zeros = [torch.zeros(p.shape, dtype=torch.int16) for p in self.params]
            self.options["remainders"] = zeros

    def outputs(self) -> list[Tensor]:
        """What a step writes, the figures last."""
        state = [t for lists in (*self.moments, *self.scales) for t in lists]
        return [*self.params, *state, *self.options.get("remainders", []), *self.steps, self.stats]

    def step(self, grads: list[Tensor], **options: Any) -> None:
        f = self.feature
        if f.grad_scale is not None:
            grads = [g * f.grad_scale for g in grads]
            options.setdefault("grad_scale", torch.tensor(f.grad_scale))
            options.setdefault("found_inf", torch.tensor(0.0))
        options |= dict(zip(RULES[self.rule].scales, self.scales, strict=True))
        op = getattr(fastkernels, f"anchored_{self.rule}_")
        op(
            self.params,
            grads,
            *self.moments,
            self.steps,
            self.hyper,
            [0] * len(self.params),
            anchors=self.anchors if f.anchor_decay else [],
            curvature=self.curvature if f.curvature else [],
            max_grad_norm=f.max_grad_norm,
            stats=self.stats,
            **{**self.options, **options},
        )


def state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def torch_steps(run: Run, gradients: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """What torch's own optimizer, clipping and an eager pull make of `run` at `dtype`.

    For a dtype below float32 the arithmetic is float32 and rounded once per step, as ours.
    """
    f = run.feature
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    params = [torch.nn.Parameter(p.detach().to(arithmetic, copy=True)) for p in run.params]
    common = {"lr": LR, "weight_decay": f.weight_decay, "maximize": f.maximize, "foreach": False}
    optimizer: torch.optim.Optimizer
    if run.rule == "adamw":
        optimizer = torch.optim.AdamW(params, **common)
    else:
        optimizer = torch.optim.SGD(params, momentum=run.momentum, nesterov=run.nesterov, **common)
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(arithmetic, copy=True)
        if f.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, f.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for p, w0, curvature in zip(params, run.anchors, run.curvature, strict=True):
                c = LR * f.anchor_decay * (curvature.to(arithmetic) if f.curvature else 1.0)
                p.copy_((p + c * w0.to(arithmetic)) / (1 + c))
                p.copy_(p.to(dtype))
    return [p.detach().to(dtype) for p in params]
