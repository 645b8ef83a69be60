"""What curvature needs of a loss: its gradient and its Hessian in the network's output."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast.curvature.losses.denominators import Denominators, check_reduction
from fast.curvature.network.graph import SecondDerivativeError, cut_off
from fast.curvature.network.parameter_space import dot

LossFn = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class OutputHessian:
    """A symmetric matrix at the network's output, for K vectors u [K, *output] at once.

    `product(u)` is [K, *output] and may overwrite u; `quad(u)` is u^T H u, [K], float64.
    """

    product: Callable[[Tensor], Tensor]
    quad: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, product: Callable[[Tensor], Tensor]) -> OutputHessian:
        """The matrix that is known by its products alone."""
        return cls(product, lambda u: dot([u], [product(u.clone())]))


class Loss:
    """A scalar loss of (output, target), the mean or the sum over a batch.

    Over several batches a loss is that of all data at once: the mean of the batches' values, each
    weighted by its denominator, or their sum.

    Args:
        fn: (output, target) -> one number.
        reduction: "mean" or "sum". Without a denominator, what a mean divides by is measured, and a
            function that turns out to be a sum over samples is added up (see `Denominators`).
        denominator: (output, target) -> number that the mean over this batch divides by: the number
            of samples, that of labels that count, or the sum of their weights.
    """

    def __init__(
        self,
        fn: LossFn,
        reduction: str = "mean",
        denominator: Callable[[Tensor, Any], float | Tensor] | None = None,
    ):
        check_reduction(reduction)
        for name, function in (("loss_fn", fn), ("denominator", denominator)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function of (output, target); got {function!r}")
        self.fn = fn
        self.reduction = reduction
        self.denominator = denominator
        self._denominators = Denominators(self.value)

    @property
    def is_measured(self) -> bool:
        """Whether only a measurement can tell what the mean divides by."""
        is_known = type(self).weight is not Loss.weight or self.denominator is not None
        return self.reduction == "mean" and not is_known

    def fresh(self) -> Loss:
        """The same loss for another pass over the data."""
        other = copy.copy(self)
        other._denominators = Denominators(other.value)
        return other

    def state(self) -> list[Any]:
        """Everything that the loss depends on besides output and target."""
        return [*parts(self.fn), *parts(self.denominator), self.reduction]

    of_classes = False  # whether one dimension of the output holds classes

    def class_dim(self, z: Tensor, y: Any, default: int | None = None) -> int:
        """The dimension of z [N, ...] that has to become its dimension 1.

        Args:
            default: the answer where the target does not tell.
        """
        return 1

    def value(self, z: Tensor, y: Any) -> Tensor:
        """The loss of one batch, a number []."""
        loss = self.fn(z, y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return one number per batch; got {got}: reduce it")
        return loss.reshape(())

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        """What a batch of `size` samples weighs in the mean over all data; 0 if it has no label.

        Denominators are measured against the first batch: batches have to come in the order of the
        data, and every pass over the data needs a fresh `Loss`.

        Raises:
            ValueError: the denominator cannot be measured.
        """
        if self.denominator is not None:
            return self._call_denominator(z, y)
        if self.reduction == "sum":
            return float(size)
        weight = self._denominators.weight(z, y, size)
        self.reduction = self._denominators.reduction or self.reduction
        return weight

    def _call_denominator(self, z: Tensor, y: Any) -> float:
        assert self.denominator is not None
        value = float(self.denominator(z, y))
        if not 0 <= value < math.inf:
            raise ValueError(f"denominator must give a number of at least 0; it gave {value:g}")
        return value

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """dL/dz, shaped as z."""
        z = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.value(z, y), z)
        return g

    def hessian(self, z: Tensor, y: Any) -> OutputHessian:
        """The matrix d2L/dz2 at this output, as products and forms of K vectors [K, *z.shape]."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            # The cotangent requires a gradient: without that, a backward marked
            # once_differentiable would leave no mark in the graph.
            value = self.value(z, y)
            one = torch.ones_like(value, requires_grad=True)
            (g,) = torch.autograd.grad(value, z, one, create_graph=True, allow_unused=True)
            if cut_off([g]):
                raise _no_second_derivative("its backward is marked once_differentiable")
        if g is None or not g.requires_grad:
            return OutputHessian.of(torch.zeros_like)

        def product(u: Tensor) -> Tensor:
            try:
                out = [
                    torch.autograd.grad(
                        g, z, v, retain_graph=True, allow_unused=True, materialize_grads=True
                    )[0]
                    for v in u
                ]
            except RuntimeError as error:
                raise _no_second_derivative(str(error)) from error
            return torch.stack(out)

        return OutputHessian.of(product)

    def residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        """Rows r [n, d] and a factor c: the empirical Fisher is c * sum_i J_i^T r_i r_i^T J_i.

        There is a row per sample, and the samples are the first dimension of z.
        """
        size = z.shape[0] if z.ndim else 1
        scale = self.per_sample(z, y, size)
        rows = self.gradient(z, y).reshape(size, -1) * scale
        return rows, 1.0 / (scale or 1.0)

    def per_sample(self, z: Tensor, y: Any, size: int) -> float:
        """The factor from the gradient in one of `size` rows to that of the row's own loss."""
        if self.denominator is not None:
            return self._call_denominator(z, y) if self.reduction == "mean" else 1.0
        if self.reduction == "mean":
            self.reduction = self._denominators.of_samples(z, y)
        return float(size) if self.reduction == "mean" else 1.0

    def sampled_residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        """As `residual`, with targets drawn so that its expectation is the GGN.

        Args:
            y: the target in the data or None; it says which labels are ignored, and their weights.
        """
        return self.residual(z, self.sample(z, y))

    def rows(self, u: Tensor) -> Tensor:
        """Vectors [K, *z] as [K, n, d], with rows as in `residual`."""
        return u.flatten(2) if u.ndim > 2 else u[..., None]

    def unrows(self, u: Tensor, shape: torch.Size) -> Tensor:
        """The opposite of `rows`: [K, n, d] as [K, *shape]."""
        return u.reshape(u.shape[0], *shape)

    def sample(self, z: Tensor, y: Any) -> Any:
        """Targets drawn from the network's own predictive distribution."""
        raise NotImplementedError(
            "the Monte-Carlo Fisher draws labels from the network's predictive distribution, which "
            "is known for cross-entropy and squared error; use kind='empirical', or fast.GGN"
        )

    def predict(self, z: Tensor, y: Any) -> Any:
        """The network's most likely target."""
        raise NotImplementedError(
            "the predicted label is known for cross-entropy and squared error; use labels='data'"
        )


def _no_second_derivative(reason: str) -> SecondDerivativeError:
    return SecondDerivativeError(
        f"loss_fn cannot be differentiated twice: {reason}. Write it with operations that can, or "
        "use fast.curvature.Fisher(..., kind='empirical')"
    )


def parts(fn: Any) -> list[Any]:
    """The function itself, or the function and the arguments of a partial."""
    if isinstance(fn, functools.partial):
        return [fn.func, *fn.args, *fn.keywords.values()]
    return [fn]
