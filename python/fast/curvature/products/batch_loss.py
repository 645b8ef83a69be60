"""The loss of one batch, of which products are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fast.curvature.losses.loss import Loss, OutputHessian
from fast.curvature.network.batches import Batch
from fast.curvature.network.network import Network


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """What all products of one batch depend on.

    Attributes:
        batch, index: batch number `index` of the data, on the network's device.
        curvature: makes the matrix at the network's output, from loss, output and target.
    """

    network: Network
    loss: Loss
    batch: Batch
    index: int
    curvature: Callable[[Loss, Tensor, Any], OutputHessian]

    def scope(self, *, differentiable_twice: bool) -> AbstractContextManager[None]:
        """The state in which the batch is evaluated; see `Network.scope`."""
        return self.network.scope(self.index, differentiable_twice=differentiable_twice)

    def answers(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Output and target, laid out as the loss wants them."""
        return self.network.answers(leaves, self.batch, self.loss)

    def class_dim(self, z: Tensor) -> int:
        """The dimension of the network's output that becomes dimension 1."""
        return self.network.class_dim(z, self.batch, self.loss)
