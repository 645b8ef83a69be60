"""The line between two checkpoints, and what follows the weights on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fast.adapt.guards.weight_line import WeightLine


class Follower(Protocol):
    """Something beside the weights that depends on them."""

    def follow(self) -> None:
        """Set it for the weights of now."""


class Way(WeightLine):
    """The line of WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), with what moves along.

    Args:
        params: the parameters that move, at w1.
        starts: w0.

    Attributes:
        followers: of the weights.
    """

    def __init__(self, params: Sequence[Tensor], starts: Sequence[Tensor]) -> None:
        super().__init__(params, starts)
        self.followers: list[Follower] = []

    def go(self, place: float) -> None:
        """Go to `place`; exact whatever came before."""
        super().go(place)
        for follower in self.followers:
            follower.follow()
