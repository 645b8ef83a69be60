"""Means over batches and over the ranks of a process group."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from fast.curvature.network.parameter_space import Blocks


class WeightedMean:
    """Running mean (or sum) of blocks over batches; a single batch costs no pass of its own."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.reduction = "mean"
        self.group = group
        self.total: Blocks | None = None
        self.weight = 0.0

    def add(self, part: Blocks, weight: float, reduction: str) -> None:
        """Add one batch, by the "mean" or "sum" that its loss is: some learn that at the second."""
        self.reduction = reduction
        if weight == 0:  # every label is ignored: the batch has no loss at all
            return
        self.weight += weight
        if self.total is None:
            self.total = part
        elif reduction == "sum":
            torch._foreach_add_(self.total, part)
        else:
            torch._foreach_lerp_(self.total, part, weight / self.weight)

    def result(self, like: Blocks | None = None) -> Blocks:
        """The mean; with a group, over all ranks.

        Args:
            like: blocks of the same shapes, for a rank whose batches have no label.
        """
        if self.group is not None:
            self._reduce(like)
        if self.total is None or not self.weight:
            raise ValueError("no batch of data has a sample with a label: nothing to average")
        return self.total

    def _reduce(self, like: Blocks | None) -> None:
        """One all-reduce of the weighted sum and the weight gives the same bits on every rank."""
        blocks = self.total if self.total is not None else [torch.zeros_like(b) for b in like or []]
        factor = 1.0 if self.reduction == "sum" else self.weight
        # Half precision would round the weight, and the sums over ranks.
        dtype = functools.reduce(torch.promote_types, (b.dtype for b in blocks), torch.float32)
        flat = torch.cat(
            [b.reshape(-1).to(dtype) * factor for b in blocks]
            + [torch.tensor([self.weight], dtype=dtype, device=blocks[0].device)]
        )
        dist.all_reduce(flat, group=self.group)
        *parts, weight = flat.split([b.numel() for b in blocks] + [1])
        self.weight = float(weight)
        divisor = 1.0 if self.reduction == "sum" else self.weight or 1.0
        self.total = [
            (p / divisor).view_as(b).to(b.dtype) for p, b in zip(parts, blocks, strict=True)
        ]
