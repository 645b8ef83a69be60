"""How far the backbone has moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fast import dtensor


class Drift:
    """`||w - w0||` over some parameters.

    Args:
        params: trained parameters.
        anchors: w0, the values that they started from, in the same order.
    """

    def __init__(self, params: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
        self.params, self.anchors = list(params), list(anchors)

    @torch.no_grad()
    def __call__(self) -> float:
        """The distance over all ranks, computed in float64."""
        pairs = zip(self.params, self.anchors, strict=True)
        return float(dtensor.norm(p.double() - a.double() for p, a in pairs))
