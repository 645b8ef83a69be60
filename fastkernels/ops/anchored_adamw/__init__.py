"""`anchored_adamw_`: one fused AdamW step of many tensors, with a pull towards an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels import _backends, _cuda, _native, _schemas, _triton, _update
from fastkernels._update import Optionals

OP = _update.Op(
    name="anchored_adamw_",
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "anchor_decay", "maximize"),
    moments=("exp_avgs", "exp_avg_sqs"),
)
_backends.register(OP.name, "native", ("cpu",), f"{__name__}.native", _native.available)
# On an H200 Triton's takes 0.4 to 0.65 of the time of CUDA C++ (docs/update.md).
_backends.register(OP.name, "triton", ("cuda",), f"{__name__}.triton", _triton.available)
_backends.register(OP.name, "native", ("cuda",), f"{__name__}.cuda", _cuda.available)
_backends.register(OP.name, "reference", ("cpu", "cuda"), f"{__name__}.reference")
_backends.register(OP.name, "triton", ("cpu",), f"{__name__}.triton", _triton.available_on_cpu)


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

    The equation is in `fastkernels.ops.anchored_adamw.reference`; how state is stored in few bytes,
    in `fastkernels._storage`. Arithmetic is float32, or float64 for float64 parameters.

    Args:
        params, grads: `N` tensors each, of the same shapes; any floating dtypes, any strides.
        exp_avgs, exp_avg_sqs: `N` tensors of these shapes: float32, float64, bfloat16 (the second
            rounded stochastically) or uint8 codes.
        steps: `N` float32 tensors `[]`, the number of steps done; advanced by one.
        hyper: float64 `[G, 7]`, a row per group: lr, beta1, beta2, eps, weight_decay, anchor_decay,
            maximize (0 or 1).
        groups: `N` row indices into `hyper`.
        anchors: empty, or `N` tensors or None: the weights `w0` pulled to.
        curvature: empty, or `N` tensors or None: `F >= 0` of the pull; None means 1.
        curvature_scales, exp_avg_scales, exp_avg_sq_scales: empty, or `N` float32 tensors
            `[ceil(numel / 128)]` for uint8 codes (None, or 0 elements, for the others).
        remainders: empty, or `N` int16 tensors of the shapes of bfloat16 parameters (0 elements for
            the others): the 16 bits that make them float32.
        grad_scale: `[]` or `[1]`; gradients are divided by it.
        found_inf: `[]` or `[1]`; nonzero: nothing changes, not even `steps` and `stats`.
        max_grad_norm: clip the global norm of the unscaled gradients to this, without rewriting
            them. With `grad_scale`, a norm that is not finite counts as `found_inf`.
        stats: float64 `[4]`, written: gradient norm (unscaled, before clipping), drift
            `||w - w0||`, update norm, forgetting `1/2 sum F (w - w0)^2`; before storage rounding.
        seed: of the stochastic rounding.

    Raises:
        ValueError: lists, shapes, dtypes or devices do not fit; the message names the entry.
        RuntimeError: FASTKERNELS_BACKEND names a backend that is not there.
    """
    step = _step if _update.direct(OP, params, grads) else torch.ops.fastkernels.anchored_adamw_
    step(
        params, grads, exp_avgs, exp_avg_sqs, steps, hyper, groups,
        anchors=anchors, curvature=curvature, curvature_scales=curvature_scales,
        exp_avg_scales=exp_avg_scales, exp_avg_sq_scales=exp_avg_sq_scales, remainders=remainders,
        grad_scale=grad_scale, found_inf=found_inf, max_grad_norm=max_grad_norm, stats=stats,
        seed=seed,
    )  # fmt: skip


def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    **options: Any,
) -> None:
    moments, scales = (exp_avgs, exp_avg_sqs), (exp_avg_scales, exp_avg_sq_scales)
    _update.run(
        _update.Batch(
            OP, params, grads, moments, steps, hyper, groups, moment_scales=scales, **options
        )
    )


_schemas.implement(OP.name, _step)
