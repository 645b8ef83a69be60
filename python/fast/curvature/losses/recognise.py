"""Recognise a loss by its function, its module of torch.nn or its name."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import nn

from fast.curvature.losses.closed_forms import (
    CrossEntropy,
    Elementwise,
    NegativeLogLikelihood,
    SquaredError,
)
from fast.curvature.losses.denominators import REDUCTIONS, check_reduction
from fast.curvature.losses.loss import Loss

NAMES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
OF_CLASSES: dict[Any, type[CrossEntropy] | type[NegativeLogLikelihood]] = {
    F.cross_entropy: CrossEntropy,
    F.nll_loss: NegativeLogLikelihood,
    nn.CrossEntropyLoss.forward: CrossEntropy,
    nn.NLLLoss.forward: NegativeLogLikelihood,
}
SQUARES = (F.mse_loss, nn.MSELoss.forward)
# With weights, one for each entry, the means of these are over the sum of the weights.
WEIGHTED = (F.mse_loss, F.l1_loss)
# The means of these are over all entries, whatever their other options.
ELEMENTWISE = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.hinge_embedding_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
    nn.BCELoss.forward,
    nn.BCEWithLogitsLoss.forward,
    nn.HingeEmbeddingLoss.forward,
    nn.HuberLoss.forward,
    nn.KLDivLoss.forward,
    nn.L1Loss.forward,
    nn.PoissonNLLLoss.forward,
    nn.SmoothL1Loss.forward,
    nn.SoftMarginLoss.forward,
)
OPTIONS = ("weight", "ignore_index", "label_smoothing")


def recognise(loss_fn: Any, reduction: str = "mean") -> Loss:
    """The loss of torch behind `loss_fn`, with its denominator, or else a plain `Loss`.

    A loss of torch is summed where either `reduction` or its own reduction is "sum". Partials with
    keywords only, and subclasses of torch's modules that keep their `forward`, are recognised too.

    Raises:
        TypeError: `loss_fn` is no function.
        ValueError: `reduction`, or that of the loss itself, does not give one number.
    """
    check_reduction(reduction)
    if isinstance(loss_fn, Loss):
        if reduction != "mean" and reduction != loss_fn.reduction:
            raise ValueError(
                f"reduction={reduction!r}, and loss_fn is a Loss of reduction "
                f"{loss_fn.reduction!r}: make it with the one that is meant"
            )
        return loss_fn.fresh()
    if isinstance(loss_fn, str):
        loss_fn = NAMES.get(loss_fn, loss_fn)
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function of (output, target), 'cross_entropy' or 'mse'; got "
            f"{loss_fn!r}"
        )
    function, options = _taken_apart(loss_fn)
    fn_reduction = options.pop("reduction", "mean")
    if isinstance(fn_reduction, str) and fn_reduction == "none":
        raise ValueError(
            "loss_fn has reduction='none', one number per entry: take 'mean' or 'sum', or reduce "
            "it in a function of your own"
        )
    reduction = "sum" if "sum" in (fn_reduction, reduction) else "mean"
    if fn_reduction in REDUCTIONS and not options.keys() & {"size_average", "reduce"}:
        if function in OF_CLASSES and not options.keys() - set(OPTIONS):
            return OF_CLASSES[function](reduction=reduction, **options)
        if function in WEIGHTED and options.get("weight") is not None:
            return Loss(loss_fn, reduction)
        if function in SQUARES and not options.keys() - {"weight"}:
            return SquaredError(reduction)
        if function in ELEMENTWISE:
            return Elementwise(loss_fn, fn_reduction, reduction)
    return Loss(loss_fn, reduction)


def _taken_apart(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    """The function or `forward` of torch behind a loss, and its options; (None, {}) for others."""
    if isinstance(loss_fn, nn.Module):
        forward = type(loss_fn).forward
        if forward.__module__ != nn.modules.loss.__name__:
            return None, {}
        names = (*OPTIONS, "reduction")
        return forward, {n: getattr(loss_fn, n) for n in names if hasattr(loss_fn, n)}
    function = loss_fn
    options: dict[str, Any] = {}
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        function, options = loss_fn.func, dict(loss_fn.keywords)
    return (function, options) if getattr(function, "__module__", "") == F.__name__ else (None, {})
