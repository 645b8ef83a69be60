"""`anchored_adamw_`: one fused AdamW step of many tensors, with a pull towards an anchor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkernels.op import operator
from fastkernels.ops.update.call import BACKENDS, Rule, UpdateCall, direct, fake, run

ADAMW = Rule(
    name="anchored_adamw_",
    columns=("lr", "beta1", "beta2", "eps", "weight_decay", "anchor_decay", "maximize"),
    moments=("exp_avgs", "exp_avg_sqs"),
    scales=("exp_avg_scales", "exp_avg_sq_scales"),
)


@operator(
    fake=fake,
    mutates=(*ADAMW.outputs, "stats"),
    backends=BACKENDS,
    direct=direct,
)
def anchored_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    anchors: Sequence[Tensor | None] = (),
    curvature: Sequence[Tensor | None] = (),
    curvature_scales: Sequence[Tensor | None] = (),
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

    The equation is in `fastkernels.ops.update.reference`; how state is stored in few bytes,
    in `fastkernels.codes`. Arithmetic is float32, or float64 for float64 parameters.

    Args:
        params: `N` tensors; any floating dtypes, any strides.
        grads: `N` tensors of these shapes; any floating dtypes, any strides.
        exp_avgs: `N` tensors of these shapes: float32, float64, bfloat16 or uint8 codes.
        exp_avg_sqs: the same; bfloat16 is rounded stochastically.
        steps: `N` float32 tensors `[]`, the number of steps done; advanced by one. It is for the
            caller to keep it finite and not negative: to read it would wait for the device.
        hyper: float64 `[G, 7]`, a row per group: lr, beta1, beta2, eps, weight_decay, anchor_decay,
            maximize (0 or 1).
        groups: `N` row indices into `hyper`.
        anchors: empty, or `N` tensors or None: the weights `w0` pulled to.
        curvature: empty, or `N` tensors or None: `F >= 0` of the pull; None means 1.
        curvature_scales: empty, or `N` float32 tensors `[ceil(numel / 128)]` for uint8 codes (None,
            or 0 elements, for the others).
        exp_avg_scales: the same, of `exp_avgs`.
        exp_avg_sq_scales: the same, of `exp_avg_sqs`.
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
    run(UpdateCall(
        rule=ADAMW, params=params, grads=grads, moments=(exp_avgs, exp_avg_sqs),
        moment_scales=(exp_avg_scales, exp_avg_sq_scales), steps=steps, hyper=hyper, groups=groups,
        anchors=anchors, curvature=curvature, curvature_scales=curvature_scales,
        remainders=remainders, grad_scale=grad_scale, found_inf=found_inf,
        max_grad_norm=max_grad_norm, stats=stats, seed=seed,
    ))  # fmt: skip
