"""Ways from the weights before fine-tuning to those after it, and the search for a place on one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fast.adapt.guards.weight_line import WeightLine
from fast.merge.rewind.statistics import MovingStatistics


class Way(WeightLine):
    """Weights `w0 + min(1, place * reach) (w1 - w0)`, with a reach for each parameter.

    With a reach of 1 for all it is the line of WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903).
    The source's batch norm statistics move along.

    Args:
        params: the parameters that move.
        starts: w0.
        ends: w1.
        reach: of each parameter; the least is 1, so that all are at w1 at place 1.
        statistics: of the source.
    """

    def __init__(
        self,
        *,
        params: Sequence[Tensor],
        starts: Sequence[Tensor],
        ends: Sequence[Tensor],
        reach: Sequence[float] | None = None,
        statistics: MovingStatistics,
    ) -> None:
        super().__init__(params, starts)
        self.ends = [x.detach().clone() for x in ends]
        self.reach = [1.0] * len(params) if reach is None else list(reach)
        self._statistics = statistics

    @torch.no_grad()
    def go(self, place: float) -> None:
        """Go to `place`; exact whatever came before."""
        ways = zip(self.params, self.anchors, self.ends, self.reach, strict=True)
        for p, start, end, reach in ways:
            p.copy_(torch.lerp(start, end, min(1.0, place * reach)))
        self.place = place
        self._statistics.follow()
