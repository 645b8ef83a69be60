"""`anchored_adamw_`: one fused AdamW step of many tensors, with a pull towards an anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkernels import _backends, _checks, _native, _schemas
from fastkernels._update import Batch, Optionals
from fastkernels.ops.anchored_adamw.reference import HYPER

OP = "anchored_adamw_"
_backends.register(OP, "native", ("cpu",), f"{__name__}.native", _native.available)
_backends.register(OP, "reference", ("cpu", "cuda"), f"{__name__}.reference")


def anchored_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    anchors: Optionals = (),
    curvature: Optionals = (),
    curvature_scales: Optionals = (),
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    remainders: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    stats: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Step every tensor of `params` in place, and its moments and step count with it.

    The equation is in `fastkernels.ops.anchored_adamw.reference`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: `N` tensors each, of the same shapes; any strides.
        steps: `N` float32 tensors `[]`, the number of steps done; advanced by one.
        hyper: float64 `[G, 7]`, a row per group: lr, beta1, beta2, eps, weight_decay, anchor_decay,
            maximize (0 or 1).
        groups: `N` row indices into `hyper`.
        anchors: empty, or `N` tensors or None: the weights `w0` pulled to.
        curvature: empty, or `N` tensors or None: `F >= 0` of the pull; None means 1.
        grad_scale: `[]` or `[1]`; gradients are divided by it.
        found_inf: `[]` or `[1]`; nonzero: nothing changes, not even `steps` and `stats`.
        max_grad_norm: clip the global norm of the unscaled gradients to this, without rewriting
            them.
        stats: float64 `[4]`, written: gradient norm (unscaled, before clipping), drift
            `||w - w0||`, update norm, forgetting `1/2 sum F (w - w0)^2`; before storage rounding.
        seed: of the stochastic rounding.

    Raises:
        ValueError: lists, shapes, devices or layouts do not fit; the message names the entry.
    """
    torch.ops.fastkernels.anchored_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, steps, hyper, groups,
        anchors=anchors, curvature=curvature, curvature_scales=curvature_scales,
        exp_avg_scales=exp_avg_scales, exp_avg_sq_scales=exp_avg_sq_scales, remainders=remainders,
        grad_scale=grad_scale, found_inf=found_inf, max_grad_norm=max_grad_norm, stats=stats,
        seed=seed,
    )  # fmt: skip


@torch.no_grad()
def _implementation(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    anchors: Optionals,
    curvature: Optionals,
    curvature_scales: Optionals,
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    remainders: Sequence[Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    stats: Tensor | None = None,
    seed: int = 0,
) -> None:
    batch = Batch(
        params, grads, (exp_avgs, exp_avg_sqs), steps, hyper, groups, anchors, curvature,
        curvature_scales, (exp_avg_scales, exp_avg_sq_scales), remainders, grad_scale, found_inf,
        max_grad_norm, stats, seed,
    )  # fmt: skip
    _checks.check_batch(OP, batch, HYPER, ("exp_avgs", "exp_avg_sqs"))
    if params:
        _backends.choose(OP, params[0].device.type)(batch)


_schemas.implement(OP, _implementation)
