"""`anchored_sgd_`: one fused momentum step of many tensors, with a pull towards an anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkernels import _backends, _checks, _native, _schemas
from fastkernels._update import Batch, Optionals
from fastkernels.ops.anchored_sgd.reference import HYPER

OP = "anchored_sgd_"
_backends.register(OP, "native", ("cpu",), f"{__name__}.native", _native.available)
_backends.register(OP, "reference", ("cpu", "cuda"), f"{__name__}.reference")


def anchored_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    anchors: Optionals = (),
    curvature: Optionals = (),
    curvature_scales: Optionals = (),
    momentum_scales: Sequence[Tensor] = (),
    remainders: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    stats: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Step every tensor of `params` in place, and its momentum and step count with it.

    The equation is in `fastkernels.ops.anchored_sgd.reference`; what is not named here is as in
    `anchored_adamw_`.

    Args:
        momentum_buffers: `N` tensors; one of 0 elements means no momentum.
        steps: `N` float32 tensors `[]`; at 0 the momentum starts as the gradient, as torch's does.
        hyper: float64 `[G, 7]`, a row per group: lr, momentum, dampening, nesterov (0 or 1),
            weight_decay (coupled), anchor_decay, maximize (0 or 1).

    Raises:
        ValueError: lists, shapes, devices or layouts do not fit; the message names the entry.
    """
    torch.ops.fastkernels.anchored_sgd_(
        params, grads, momentum_buffers, steps, hyper, groups,
        anchors=anchors, curvature=curvature, curvature_scales=curvature_scales,
        momentum_scales=momentum_scales, remainders=remainders, grad_scale=grad_scale,
        found_inf=found_inf, max_grad_norm=max_grad_norm, stats=stats, seed=seed,
    )  # fmt: skip


@torch.no_grad()
def _implementation(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    anchors: Optionals,
    curvature: Optionals,
    curvature_scales: Optionals,
    momentum_scales: Sequence[Tensor],
    remainders: Sequence[Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    stats: Tensor | None = None,
    seed: int = 0,
) -> None:
    batch = Batch(
        params, grads, (momentum_buffers,), steps, hyper, groups, anchors, curvature,
        curvature_scales, (momentum_scales,), remainders, grad_scale, found_inf, max_grad_norm,
        stats, seed,
    )  # fmt: skip
    _checks.check_batch(OP, batch, HYPER, ("momentum_buffers",))
    if params:
        _backends.choose(OP, params[0].device.type)(batch)


_schemas.implement(OP, _implementation)
