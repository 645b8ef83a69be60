"""Products with any number of vectors, a few at a time."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from fast.curvature.network.memory import empty_product
from fast.curvature.network.parameter_space import Blocks

# A segment surrounds a part of a computation that may be traced. It is called with the inputs of
# this part, and what it yields is called with the results.
Segment = Callable[..., AbstractContextManager[Callable[..., None]]]


@contextmanager
def untraced(*inputs: Tensor) -> Iterator[Callable[..., None]]:
    """The segment of a computation that nobody traces."""
    yield lambda *results: None


class Passes(abc.ABC):
    """Products of one batch with any number of vectors, `chunk` of them in one pass.

    A subclass says how one pass is computed: `product_pass` and `form_pass` take all their vectors
    at once.
    """

    chunk: int

    @abc.abstractmethod
    def product_pass(self, vectors: Blocks, out: Blocks) -> None:
        """Write the products with the vectors of one pass to `out`, which has their shapes."""

    @abc.abstractmethod
    def form_pass(self, vectors: Blocks) -> Tensor:
        """v^T A v of each vector of one pass, [K]."""

    @torch.no_grad()
    def products(self, vectors: Blocks) -> Blocks:
        """One [K, *shape] block per parameter in, the same out."""
        out = list(map(empty_product, vectors))
        for part in self._parts(vectors):
            self.product_pass([v[part] for v in vectors], [o[part] for o in out])
        return out

    @torch.no_grad()
    def quad(self, vectors: Blocks) -> Tensor:
        """v^T A v of every vector, [K]."""
        parts = self._parts(vectors)
        return torch.cat([self.form_pass([v[part] for v in vectors]) for part in parts])

    def _parts(self, vectors: Blocks) -> list[slice]:
        """The vectors of each pass."""
        return [slice(k, k + self.chunk) for k in range(0, len(vectors[0]), self.chunk)]
