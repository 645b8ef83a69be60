"""The line between two checkpoints, and what follows the weights on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fast.adapt.guards.weight_line import WeightLine


class Follower(Protocol):
    """A part of the network beside the weights that depends on them."""

    def follow(self) -> None:
        """Set it for the present weights."""


class Way(WeightLine):
    """The line of WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), and what moves along it.

    Args:
        params: the parameters that move, at w1.
        starts: w0.

    Attributes:
        followers: parts that are set anew at each place.
    """

    def __init__(self, params: Sequence[Tensor], starts: Sequence[Tensor]) -> None:
        super().__init__(params, starts)
        self.followers: list[Follower] = []

    def go(self, place: float) -> None:
        """Go to `place`; the weights there do not depend on the places before."""
        super().go(place)
        for follower in self.followers:
            follower.follow()
