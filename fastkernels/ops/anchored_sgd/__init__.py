"""`anchored_sgd_`: one fused momentum step of many tensors, with a pull towards an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels import _backends, _cuda, _native, _schemas, _triton, _update
from fastkernels._update import Optionals

OP = _update.Op(
    name="anchored_sgd_",
    hyper=("lr", "momentum", "dampening", "nesterov", "weight_decay", "anchor_decay", "maximize"),
    moments=("momentum_buffers",),
    optional_moments=("momentum_buffers",),
)
_backends.register(OP.name, "native", ("cpu",), f"{__name__}.native", _native.available)
# On an H200 Triton's takes 0.4 to 0.65 of the time of CUDA C++ (docs/update.md).
_backends.register(OP.name, "triton", ("cuda",), f"{__name__}.triton", _triton.available)
_backends.register(OP.name, "native", ("cuda",), f"{__name__}.cuda", _cuda.available)
_backends.register(OP.name, "reference", ("cpu", "cuda"), f"{__name__}.reference")
_backends.register(OP.name, "triton", ("cpu",), f"{__name__}.triton", _triton.available_on_cpu)


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
        momentum_buffers: `N` tensors, as the first moments of AdamW; one of 0 elements means no
            momentum.
        steps: `N` float32 tensors `[]`; at 0 the momentum starts as the gradient, as torch's does.
        hyper: float64 `[G, 7]`, a row per group: lr, momentum, dampening, nesterov (0 or 1),
            weight_decay (coupled), anchor_decay, maximize (0 or 1).

    Raises:
        ValueError: lists, shapes, dtypes or devices do not fit; the message names the entry.
        RuntimeError: FASTKERNELS_BACKEND names a backend that is not there.
    """
    step = _step if _update.direct(OP, params, grads) else torch.ops.fastkernels.anchored_sgd_
    step(
        params, grads, momentum_buffers, steps, hyper, groups,
        anchors=anchors, curvature=curvature, curvature_scales=curvature_scales,
        momentum_scales=momentum_scales, remainders=remainders, grad_scale=grad_scale,
        found_inf=found_inf, max_grad_norm=max_grad_norm, stats=stats, seed=seed,
    )  # fmt: skip


def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    momentum_scales: Sequence[Tensor],
    **options: Any,
) -> None:
    moments, scales = (momentum_buffers,), (momentum_scales,)
    _update.run(
        _update.Batch(
            OP, params, grads, moments, steps, hyper, groups, moment_scales=scales, **options
        )
    )


_schemas.implement(OP.name, _step)
