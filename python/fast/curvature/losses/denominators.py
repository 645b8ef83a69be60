"""Measure what the mean of a loss divides by, where that is not known.

A mean over the samples of two batches together is `(d1 L1 + d2 L2) / (d1 + d2)`. Its gradient in
the outputs of the first batch is therefore `d1 / (d1 + d2)` times the gradient of that batch alone.
This share is measured; the values, and the gradient in the second batch, have to agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fast.errors import first_line

REDUCTIONS = ("mean", "sum")
WAY_OUT = (
    "Say what its mean divides by, fast.curvature.Loss(loss_fn, denominator=lambda output, target: "
    "...), add the batches up with reduction='sum', or give all data as one batch"
)
NEITHER = "it is neither a mean nor a sum over samples"
# The largest disagreement of two measurements, in square roots of the machine precision.
SLACK = 8.0
# The largest distance from a whole number that passes for rounding, in units of that precision.
ROUNDING = 256.0


def check_reduction(reduction: Any) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean' or 'sum'; got {reduction!r}")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """A loss of two batches in one call.

    Attributes:
        first, second: the gradient in the outputs of each batch, as a multiple of the gradient of
            that batch alone; NaN where that is zero or not finite.
        additive: whether the loss is the sum of the two losses, each times its multiple.
    """

    first: float
    second: float
    additive: bool


class Denominators:
    """Denominators of the batches of one pass over the data, in units of the first one's.

    The first batch weighs as many as it has rows; for a mean over samples, so does every other.

    Args:
        value: the loss, (output, target) -> 0-d tensor.
    """

    def __init__(self, value: Callable[[Tensor, Any], Tensor]):
        self.value = value
        self.reduction: str | None = None  # as measured
        self.by_rows = False  # whether gradients of single samples are needed
        self.first: tuple[Tensor, Any] | None = None

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        """The denominator of the next batch; 0 where it has no label."""
        z = z.detach()
        rows = float(z.shape[0] if z.ndim else size)
        with torch.no_grad():
            # A mean over no label is 0 / 0.
            if not self.value(z, y).isfinite() and bool(z.isfinite().all()):
                return 0.0
        if self.first is None:
            self.first = (z, y)
            return rows
        if self.reduction is None:
            self.reduction = self._reduction_of(*self.first)
        share = self._share_of_first(z, y)
        if self.reduction == "sum":
            return rows
        unit = float(self.first[0].shape[0])
        weight = max(unit * (1 - share) / share, 0.0)
        if self.by_rows and min(weight, abs(weight - rows)) > tolerance(z) * rows:
            raise _unknown("its mean is not over samples, so single samples have no gradients")
        rounding = ROUNDING * _precision(z) * max(rows, unit)
        return next((n for n in (rows, 0.0) if abs(weight - n) < rounding), weight)

    def of_samples(self, z: Tensor, y: Any) -> str:
        """ "mean" or "sum", whichever the loss is over samples; from now on it has to be one."""
        self.by_rows = True
        self.reduction = self.reduction or self._reduction_of(z, y)
        return self.reduction

    def _reduction_of(self, z: Tensor, y: Any) -> str:
        """ "mean" or "sum": what the loss of a batch with itself shows."""
        twice = self._joint((z.detach(), y), (z.detach(), y))
        if math.isnan(twice.first):
            raise _unknown("its gradient in the outputs of the first batch is zero")
        for reduction, share in (("mean", 0.5), ("sum", 1.0)):
            if twice.additive and abs(twice.first - share) < tolerance(z):
                return reduction
        raise _unknown(NEITHER)

    def _share_of_first(self, z: Tensor, y: Any) -> float:
        """The share d1 / (d1 + d2) of the first batch in the loss of it and of this one."""
        assert self.first is not None
        joint = self._joint(self.first, (z, y))
        right = joint.additive
        if self.reduction == "sum":
            right &= abs(joint.first - 1) < tolerance(z)
        elif not math.isnan(joint.second):
            right &= abs(joint.first + joint.second - 1) < tolerance(z)
        if not right:
            raise _unknown(NEITHER)
        return joint.first

    def _joint(self, first: tuple[Tensor, Any], second: tuple[Tensor, Any]) -> Joint:
        try:
            return joint(self.value, first, second)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise _unknown(f"batches cannot be joined to measure it ({first_line(error)})") from (
                error
            )


def joint(
    value: Callable[[Tensor, Any], Tensor], first: tuple[Tensor, Any], second: tuple[Tensor, Any]
) -> Joint:
    """Compare a loss of two batches (output, target) in one call with that of each.

    Raises:
        ValueError, RuntimeError, ...: they cannot be joined along their first dimension.
    """
    both = pytree.tree_map(_join, first, second)
    (a, ga), (b, gb), (c, gc) = (
        _value_and_gradient(value, *part) for part in (first, second, both)
    )
    rows = first[0].shape[0]
    shares, agree = [], True
    limit = tolerance(first[0])
    for alone, together in ((ga, gc[:rows]), (gb, gc[rows:])):
        square = float(alone.square().sum())
        share = float((alone * together).sum()) / square if square else math.nan
        shares.append(share)
        if math.isfinite(share):
            error = float((together - share * alone).norm())
            agree &= error <= limit * max(float(gc.norm()), abs(share) * square**0.5)
    one, other = shares
    if not math.isnan(one + other):
        size = abs(c) + abs(one * a) + abs(other * b)
        agree &= abs(c - one * a - other * b) <= limit * max(size, 1e-30)
    return Joint(first=one, second=other, additive=agree)


def _value_and_gradient(
    value: Callable[[Tensor, Any], Tensor], z: Tensor, y: Any
) -> tuple[float, Tensor]:
    if z.element_size() < 4:  # half precision would not tell one denominator from another
        z, y = (pytree.tree_map(_single, t) for t in (z, y))
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        loss = value(z, y)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, z, allow_unused=True)
    gradient = torch.zeros_like(z) if gradient is None else gradient
    return float(loss.detach()), gradient.double()


def _join(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and a.ndim:
        return torch.cat([a, b])
    same = torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b
    if not same:
        raise ValueError("targets hold numbers that belong to a batch, not to its samples")
    return a


def _single(t: Any) -> Any:
    return t.float() if isinstance(t, Tensor) and t.is_floating_point() else t


def _precision(z: Tensor) -> float:
    return torch.finfo(torch.promote_types(z.dtype, torch.float32)).eps


def tolerance(z: Tensor) -> float:
    """Largest error of a share, by the precision in which it is measured."""
    return SLACK * _precision(z) ** 0.5


def _unknown(reason: str) -> ValueError:
    return ValueError(f"loss_fn over several batches: {reason}. {WAY_OUT}")
