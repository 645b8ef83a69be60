"""`anchored_sgd_`: one fused momentum step of many tensors, with a pull towards an anchor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkernels.op import operator
from fastkernels.ops.update.call import BACKENDS, Rule, UpdateCall, direct, fake, run

SGD = Rule(
    name="anchored_sgd_",
    columns=("lr", "momentum", "dampening", "nesterov", "weight_decay", "anchor_decay", "maximize"),
    moments=("momentum_buffers",),
    scales=("momentum_scales",),
    optional_moments=("momentum_buffers",),
)


@operator(
    fake=fake,
    mutates=(*SGD.outputs, "stats"),
    backends=BACKENDS,
    direct=direct,
)
def anchored_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    anchors: Sequence[Tensor | None] = (),
    curvature: Sequence[Tensor | None] = (),
    curvature_scales: Sequence[Tensor | None] = (),
    momentum_scales: Sequence[Tensor] = (),
    remainders: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    stats: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Step every tensor of `params` in place, and its momentum and step count with it.

    The equation is in `fastkernels.ops.update.reference`; what is not named here is as in
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
    run(UpdateCall(
        rule=SGD, params=params, grads=grads, moments=(momentum_buffers,),
        moment_scales=(momentum_scales,), steps=steps, hyper=hyper, groups=groups,
        anchors=anchors, curvature=curvature, curvature_scales=curvature_scales,
        remainders=remainders, grad_scale=grad_scale, found_inf=found_inf,
        max_grad_norm=max_grad_norm, stats=stats, seed=seed,
    ))  # fmt: skip
