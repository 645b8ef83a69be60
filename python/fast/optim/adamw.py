"""AdamW with a pull towards the pretrained weights, in one pass over memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import fastkernels
from fast.optim.base import AnchoredOptimizer
from fast.optim.batch import UpdateBatch
from fast.optim.groups import Group, check_numbers, number
from fast.optim.loading import Format


class AdamW(AnchoredOptimizer):
    """torch's AdamW, and after each step a proximal pull to the anchor `w0`.

    `w <- (adamw(w) + c w0) / (1 + c)` with `c = lr * anchor_decay * F`. With `anchor_decay=0` this
    is AdamW (Loshchilov and Hutter 2019); with `F = 1` L2-SP (Li et al. 2018), decoupled; with a
    diagonal curvature of the source loss as `F`, EWC (Kirkpatrick et al. 2017), decoupled.

    lr, betas, eps, weight_decay, anchor_decay, curvature, stall, ramp and maximize may also be set
    per group. Groups have one more key, `restraint` (1.0): like the ramp, it multiplies the group's
    lr in every step, so that a method can slow a group down while a scheduler owns `lr`.

    Args:
        params: parameters, named parameters, or dicts of groups.
        lr: learning rate; a float, or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled pull to zero, in units of lr. 0 by default (torch: 0.01).
        anchor_decay: pull to the anchor, in units of lr. Groups that have it are anchored at the
            weights they have when they are added: build the optimizer after loading the pretrained
            weights, or call `set_anchors`.
        curvature: `F`: tensors in the order and shapes of the parameters (None entries mean 1), or
            a `fast.SourceCard`.
        stall: steps for which the group is skipped: no update, no moments, no step count. A step
            that a GradScaler skipped counts neither here nor in `ramp`.
        ramp: steps over which the group's lr then rises linearly to its full value.
        maximize: ascend instead of descend.
        state_dtype: dtype of the moments: None (float32), torch.bfloat16 (the second one rounded
            stochastically) or torch.uint8 (8-bit codes). Those of float64 parameters, and their
            curvature, are always float64.
        max_grad_norm: clip the global norm of the gradients; `.grad` itself is not rewritten.
        anchor_dtype: None (the parameter's), torch.float32, torch.bfloat16 or torch.float16.
        curvature_dtype: None (float32), torch.bfloat16 or torch.uint8 (8-bit codes).
        exact_bf16: keep the 16 bits that bfloat16 parameters lack, so that their updates are those
            of float32; without, an update below half a unit in the last place is lost.
        seed: seed of the stochastic rounding.
        amsgrad: must be False.
        capturable: accepted for torch's sake, as are `foreach` and `fused`: there is one
            implementation.
        foreach: see `capturable`.
        fused: see `capturable`.
        differentiable: must be False.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    format: ClassVar[Format] = Format(
        name="AdamW",
        moments=("exp_avg", "exp_avg_sq"),
        group_keys=frozenset({"betas", "eps"}),
        torch_keys=frozenset({"amsgrad"}),  # which RAdam and NAdam lack
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        anchor_decay: float = 0.0,
        curvature: Any = None,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        *,
        anchor_dtype: torch.dtype | None = None,
        curvature_dtype: torch.dtype | None = None,
        exact_bf16: bool = False,
        seed: int = 0,
        stall: int = 0,
        ramp: int = 0,
        maximize: bool = False,
        amsgrad: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        self._refuse(amsgrad=amsgrad, differentiable=differentiable)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "anchor_decay": anchor_decay, "stall": stall, "ramp": ramp, "maximize": maximize,
            "capturable": capturable, "foreach": foreach, "fused": fused,
        }  # fmt: skip
        super().__init__(
            params,
            defaults,
            curvature=curvature,
            max_grad_norm=max_grad_norm,
            seed=seed,
            state_dtype=state_dtype,
            anchor_dtype=anchor_dtype,
            curvature_dtype=curvature_dtype,
            exact_bf16=exact_bf16,
        )

    def _check_values(self, group: Group) -> None:
        super()._check_values(group)
        check_numbers(group, "eps")
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, (beta1, beta2); got {betas!r}")
        for i, beta in enumerate(betas):
            if not 0 <= number(f"betas[{i}]", beta) < 1:
                raise ValueError(f"betas[{i}] must be in [0, 1); got {beta}")

    def _hyper_row(self, group: Group, lr: float) -> list[float]:
        beta1, beta2 = group["betas"]
        return [
            lr, float(beta1), float(beta2), group["eps"], group["weight_decay"],
            group["anchor_decay"], float(group["maximize"]),
        ]  # fmt: skip

    def _launch(self, batch: UpdateBatch, hyper: Tensor, options: dict[str, Any]) -> None:
        exp_avgs, exp_avg_scales = batch.moment("exp_avg")
        exp_avg_sqs, exp_avg_sq_scales = batch.moment("exp_avg_sq")
        fastkernels.anchored_adamw_(
            batch.params, batch.grads, exp_avgs, exp_avg_sqs, batch.column("step"), hyper,
            batch.groups, exp_avg_scales=exp_avg_scales, exp_avg_sq_scales=exp_avg_sq_scales,
            **options,
        )  # fmt: skip
