"""What an algorithm asks of a matrix: products with it, and the space that they live in."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fast.curvature.network.parameter_space import Blocks, ParameterSpace


class Symmetric(Protocol):
    """A symmetric [P, P] matrix A, known by its products alone."""

    @property
    def space(self) -> ParameterSpace:
        """The P coordinates that A acts on."""

    def products(self, vectors: Blocks) -> Blocks:
        """A V in blocks: one [K, *shape] per parameter in, the same out."""

    def rows(self, vectors: Tensor) -> Tensor:
        """A V with one vector per row, [K, P] -> [K, P]."""

    def quadratics(self, vectors: Blocks) -> Tensor:
        """v^T A v of each of the K vectors, [K], float64."""
