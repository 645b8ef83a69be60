"""Hessian, generalised Gauss-Newton and Fisher matrix of a network's loss, by their products.

`NetworkOperator` documents the arguments that they share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fast.curvature.algorithms.check import relative_error
from fast.curvature.losses.loss import Loss, OutputHessian
from fast.curvature.network.batches import Batches
from fast.curvature.network.network import Params
from fast.curvature.operators.mean import WeightedMean
from fast.curvature.operators.network_operator import NetworkOperator
from fast.curvature.operators.self_check import central_difference
from fast.curvature.products.batched import FoldedGGN, FoldedHessian
from fast.curvature.products.looped import GraphGGN, GraphHessian


class Hessian(NetworkOperator):
    """Exact Hessian H = d^2 L / dw^2 of the loss L over all data, [P, P]: symmetric, in general
    indefinite.

    Examples:
        For least squares, L = sum (X W^T - Y)^2, it is 2 I (x) X^T X:

        >>> x, y, layer = torch.randn(8, 3), torch.randn(8, 2), torch.nn.Linear(3, 2, bias=False)
        >>> H = fast.Hessian(layer, torch.nn.MSELoss(reduction="sum"), (x, y))
        >>> torch.allclose(H.dense(), 2 * torch.kron(torch.eye(2), x.T @ x), atol=1e-5)
        True
    """

    _record_class, _loop_class = FoldedHessian, GraphHessian

    def _difference_error(self, v: Tensor, av: Tensor) -> float:
        reference = self._in_float64()
        direction = self._direction(v)
        model = reference.network.model
        (hv,) = central_difference(model, direction, lambda: [reference.gradient()])
        return relative_error(av.double(), hv)


class GGN(NetworkOperator):
    """Generalised Gauss-Newton matrix J^T H_L J (Schraudolph 2002): the Hessian of the loss with
    the network linearised at its parameters. J = dz / dw is the Jacobian of the outputs, H_L =
    d^2 L / dz^2 the Hessian of the loss in them. It is positive semidefinite for a convex loss,
    equal to the Fisher matrix for cross-entropy and squared error, and needs one derivative of the
    network only.

    A loss that is linear in the output, as NLLLoss is in log-probabilities, has a GGN of zero: take
    the logits for the output, and CrossEntropyLoss.

    Examples:
        For L = sum (f(w, x) - y)^2, H_L = 2 I:

        >>> x, layer = torch.randn(8, 3), torch.nn.Linear(3, 2, bias=False)
        >>> data, loss = (x, torch.zeros(8, 2)), torch.nn.MSELoss(reduction="sum")
        >>> J = torch.kron(torch.eye(2), x)
        >>> torch.allclose(fast.GGN(layer, loss, data).dense(), J.T @ (2 * J), atol=1e-5)
        True
    """

    _record_class, _loop_class = FoldedGGN, GraphGGN

    def _difference_error(self, v: Tensor, av: Tensor) -> float | None:
        """v^T J^T H_L J v, with J v by a central difference of the outputs, against v^T A v."""
        reference = self._in_float64()
        tangents = central_difference(
            reference.network.model,
            self._direction(v),
            lambda: [z for z, _, _ in reference.answers()],
        )
        loss = reference.loss
        mean = WeightedMean(self.settings.process_group)
        for (z, y, size), t in zip(reference.answers(), tangents, strict=True):
            weight = loss.weight(z, y, size)
            mean.add([loss.hessian(z, y).quad(t[None])[0]], weight, loss.reduction)
        quad = float(mean.result([torch.zeros((), dtype=torch.float64, device=v.device)])[0])
        return abs(quad - float(v.double() @ av.double())) / max(abs(quad), 1e-30)


class Fisher(GGN):
    """Fisher matrix from gradients g of single samples, F = mean of g g^T.

    Examples:
        With kind="empirical" and one sample it is the outer product of the gradient:

        >>> layer, batch = torch.nn.Linear(3, 2), (torch.randn(1, 3), torch.tensor([1]))
        >>> F = fast.Fisher(layer, torch.nn.functional.cross_entropy, batch, kind="empirical")
        >>> g = F.gradient()
        >>> torch.allclose(F.dense(), torch.outer(g, g), atol=1e-6)
        True

    Args:
        kind: "mc" draws labels from the network's predictive distribution (seeded, the same at
            every product), which is an unbiased estimate of the GGN for cross-entropy and squared
            error. No label is needed: data may be x, or batches of x (two of them as
            [(x1, None), (x2, None)], for [x, y] is one labelled batch). "empirical" takes the
            labels of the data (Kunstner et al. 2019 on why that is another matrix).
        options: the other arguments of `Hessian` and `GGN`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        params: Params = None,
        *,
        kind: str = "mc",
        **options: Any,
    ):
        if kind not in ("mc", "empirical"):
            raise ValueError(f"kind must be 'mc' or 'empirical'; got {kind!r}")
        if kind == "mc" and not isinstance(data, Batches):
            data = Batches(data, labels=None)
        super().__init__(model, loss_fn, data, params, **options)
        self.kind = kind

    def _output_curvature(self, loss: Loss, z: Tensor, y: Any) -> OutputHessian:
        residual = loss.residual if self.kind == "empirical" else loss.sampled_residual
        r, scale = residual(z, y)

        def product(u: Tensor) -> Tensor:
            s = torch.linalg.vecdot(loss.rows(u), r[None])[..., None] * (r * scale)
            return loss.unrows(s, z.shape)

        return OutputHessian.of(product)

    def _difference_error(self, v: Tensor, av: Tensor) -> None:
        """There is none: a Fisher matrix is no derivative of anything."""
