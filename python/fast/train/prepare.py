"""Before the first step: the new head, calibrated; the batch-norm policy; the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fast.heads import calibrate, replace_head, set_batch_norm
from fast.optim import SGD, AdamW
from fast.optim.param_groups import param_groups
from fast.train.config import TrainConfig
from fast.train.data import TrainBatches, move
from fast.train.methods import Plan

# Features of this many training samples set the normaliser's first statistics: the standard error
# of a mean is then 3 % of a standard deviation, at the cost of a few forward passes.
CALIBRATION_SAMPLES = 1024


def prepare_model(
    model: nn.Module,
    num_classes: int,
    batches: TrainBatches,
    plan: Plan,
    batch_norm: str,
    device: torch.device,
) -> None:
    """Replace the head and calibrate it on target inputs, in place."""
    inputs: list[Any] = []
    seen = 0
    for batch, labels in batches.from_step(0):
        inputs.append(move(batch, device))
        seen += len(labels)
        if seen >= CALIBRATION_SAMPLES or len(inputs) >= batches.steps_per_epoch:
            break
    replace_head(model, num_classes, sample=inputs[0], max_entropy=plan.max_entropy)
    calibrate(model, inputs)
    set_batch_norm(model, batch_norm)


def make_optimizer(model: nn.Module, config: TrainConfig, plan: Plan) -> AdamW | SGD:
    """The fused optimizer over backbone and head, anchored at the weights as they are now."""
    groups = param_groups(
        model,
        lr=config.lr,
        head_lr_scale=plan.head_lr_scale,
        anchor_decay=plan.anchor_decay,
        stall=plan.stall,
        ramp=plan.ramp,
        weight_decay=config.weight_decay,
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
    if config.optimizer == "sgd":
        return SGD(groups, momentum=0.9, max_grad_norm=config.max_grad_norm)
    return AdamW(groups, max_grad_norm=config.max_grad_norm)


class Drift:
    """How far the backbone has moved from where it was when this was made.

    Uses the optimizer's anchors where it keeps them, and a copy where it does not.
    """

    def __init__(self, optimizer: AdamW | SGD) -> None:
        self.params: list[Tensor] = [
            p
            for group in optimizer.param_groups
            if group["name"].startswith("backbone")
            for p in group["params"]
        ]
        state = optimizer.state
        self.anchors: list[Tensor] = [
            state[p]["anchor"] if p in state and "anchor" in state[p] else p.detach().clone()
            for p in self.params
        ]

    @torch.no_grad()
    def __call__(self) -> float:
        """`||w - w0||`, summed in float64."""
        pairs = zip(self.params, self.anchors, strict=True)
        total = sum(((p.double() - a.double()).square().sum() for p, a in pairs), torch.zeros(()))
        return float(total.sqrt())


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The forward pass's dtype; None for full precision.

    `auto` is bfloat16 on a GPU that has it in hardware, full precision elsewhere: bfloat16 in
    software on a CPU is slower than fp32.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
