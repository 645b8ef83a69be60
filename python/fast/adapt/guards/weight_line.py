"""The line from the pretrained weights to the present ones, and the search for a place on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fast import dtensor

# The search ends within this share of its aim, on either side.
TOLERANCE = 0.05


class WeightLine:
    """Places parameters on the line `w(t) = w0 + t (w1 - w0)`, t in 0..1.

    The source loss rises along it (Wortsman et al. 2022, arXiv 2109.01903), so any loss between
    those of the ends can be chosen.

    Args:
        params: trained parameters and tracked statistics, at w1; they are moved.
        anchors: their values at w0.
    """

    def __init__(self, params: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
        # Each rank moves its own part of what is sharded.
        self.params = [dtensor.local(p.detach()) for p in params]
        self.anchors = [dtensor.local(a) for a in anchors]
        self.place = 1.0
        self._ends: list[Tensor] = []

    @torch.no_grad()
    def go(self, place: float) -> None:
        """Go to t = `place`; earlier moves leave no rounding."""
        if not self._ends:
            self._ends = [p.clone() for p in self.params]
        for p, a, end in zip(self.params, self.anchors, self._ends, strict=True):
            p.copy_(torch.lerp(a.to(p.dtype), end, place))
        self.place = place

    def land(
        self,
        measure: Callable[[], float],
        *,
        lost: float,
        aim: float,
        exponent: float,
        checks: int,
        surely: bool = True,
    ) -> float:
        """Go to a place where `aim` is lost, within a tolerance, or less.

        A secant search on `L(t) = lost * t ** exponent`. Once two measurements enclose the aim,
        they determine the exponent.

        Args:
            measure: returns what is lost at the present place.
            lost: what is lost at t = 1, where the parameters are; more than `aim`.
            exponent: a guess at how the loss grows with t.
            checks: the most measurements before the final decision.
            surely: where no place was measured to be inside and the guess is outside too, go back
                to t = 0.

        Returns:
            what is lost there, as measured.
        """
        low, high = (0.0, 0.0), (1.0, lost)
        for _ in range(checks):
            if low[1] > 0:
                exponent = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
            place = high[0] * (aim / high[1]) ** (1 / max(exponent, 0.25))
            # Stay off the edges of the enclosed interval, where a measurement tells nothing.
            width = high[0] - low[0]
            place = min(max(place, low[0] + 0.1 * width), high[0] - 0.02 * width)
            self.go(place)
            lost = measure()
            if abs(lost - aim) <= TOLERANCE * aim:
                return lost
            if lost > aim:
                high = (place, lost)
            else:
                low = (place, lost)
        if not lost > aim:
            return lost
        if low[0] > 0:  # the best place that was measured to be inside
            self.go(low[0])
            return low[1]
        self.go(high[0] * (aim / high[1]) ** (1 / max(exponent, 0.25)))
        lost = measure()
        if surely and lost > aim:
            self.go(0.0)
            lost = measure()
        return lost
