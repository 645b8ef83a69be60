"""Normalise features to zero mean and unit variance, without learned scale or shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fast.ranks import ALONE, Ranks
from fastkernels.codes import compute_dtype

# Share of the mean feature variance that is added to the variance of every feature. A ReLU feature
# that is zero on the target sample has variance 0, and would be amplified without bound later.
VARIANCE_FLOOR = 0.0025


class FeatureNorm(nn.Module):
    """`(x - mean) / std` per feature; the statistics are estimated first, and tracked in training.

    The statistics are constants to the gradient, so this is an affine map, which `fast.fold_head`
    folds into the head.

    Args:
        num_features: D.
        dim: the dimension of the features: -1 for `[..., D]` (linear heads), 1 for `[B, D, H, W]`.
        momentum: weight of a training batch in the tracked statistics.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, dim: int = -1, momentum: float = 0.01) -> None:
        super().__init__()
        self.num_features = num_features
        self.dim = dim
        self.momentum = momentum
        self.deferred = self.frozen = False
        self._pending: list[Tensor] = []
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, momentum: float | None = None) -> None:
        """Move the statistics towards those of a batch; the first batch sets them.

        Args:
            features: a batch; one with a single value per feature changes nothing.
            momentum: weight of this batch (default: `self.momentum`).
        """
        x = self.rows(features.detach().to(compute_dtype(features)))
        if x.shape[0] >= 2:
            self._move(x.mean(0), x.var(0), momentum)

    def _move(self, mean: Tensor, var: Tensor, momentum: float | None = None) -> None:
        # All on the device: an `.item()` here would stall every training step on a GPU. A batch
        # that overflowed, whose step a gradient scaler skips, would make all later ones NaN.
        finite = mean.isfinite().all() & var.isfinite().all()
        first = (self.num_batches_tracked == 0).to(mean.dtype)
        weight = first + (1 - first) * (self.momentum if momentum is None else momentum)
        for own, new in ((self.mean, mean), (self.var, var)):
            new = torch.where(finite, new, own).to(own.dtype)
            own.lerp_(new, weight.to(own.dtype))
        self.num_batches_tracked += finite

    def defer(self) -> None:
        """Collect features from now on, until `update_deferred`: a loop that splits its batches
        updates once per step."""
        self.deferred = True

    @torch.no_grad()
    def update_deferred(self, ranks: Ranks = ALONE) -> None:
        """Update with the features collected since the last call, as one batch.

        Args:
            ranks: the processes whose features make up the batch; all of them have to call this.
        """
        if not self._pending:
            return
        rows = torch.cat([self.rows(x) for x in self._pending])
        self._pending = []
        if ranks.size == 1:
            self.update(rows)
            return
        # Count, sum and sum of squares are exchanged in double precision: with a large mean, single
        # precision would lose the variance.
        x = rows.double()
        moments = ranks.sum_(torch.cat([x.sum(0), x.square().sum(0), x.new_tensor([len(x)])]))
        total, squares, count = moments.split([self.num_features, self.num_features, 1])
        mean = total / count
        var = (squares - count * mean.square()).clamp_min(0) / (count - 1)
        self._move(mean, var)

    def freeze(self) -> None:
        """Keep the statistics as they are, until `track`."""
        self.frozen = True

    def track(self) -> None:
        """Update with every batch again; features that are still pending are dropped."""
        self.deferred, self.frozen, self._pending = False, False, []

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Start from these statistics, both `[D]`."""
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.num_batches_tracked.fill_(1)

    def rows(self, features: Tensor) -> Tensor:
        """Features as `[N, D]`: one row for each sample and position."""
        return features.movedim(self.dim, -1).reshape(-1, self.num_features)

    def scale(self) -> Tensor:
        """`1 / std`, `[D]`."""
        return (self.var + VARIANCE_FLOOR * self.var.mean()).clamp_min(1e-12).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            if self.deferred:
                self._pending.append(x.detach())
            else:
                self.update(x)
        shape = [1] * x.dim()
        shape[self.dim] = self.num_features
        # A mean of 16 bits would be off by a part of the standard deviation of features that vary
        # little, and `fold_head`, which has the exact one, would answer otherwise.
        wide = x.to(compute_dtype(x))
        return ((wide - self.mean.view(shape)) * self.scale().view(shape)).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Nobody calls `update_deferred` of a copy, which would collect features without end.
        return vars(self) | {"deferred": False, "frozen": False, "_pending": []}

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}, momentum={self.momentum}"
