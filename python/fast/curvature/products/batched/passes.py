"""Products with any number of vectors, a few at a time."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from fast.curvature.network.memory import empty_product
from fast.curvature.network.parameter_space import Blocks

# What surrounds a part of the computation that may be traced: it is told the inputs of the part,
# and what it yields takes the results.
Segment = Callable[..., AbstractContextManager[Callable[..., None]]]


@contextmanager
def untraced(*inputs: Tensor) -> Iterator[Callable[..., None]]:
    """The segment of a computation that nobody traces."""
    yield lambda *results: None


class Passes(abc.ABC):
    """Products of one batch, `chunk` vectors a pass."""

    exact: bool
    chunk: int

    @abc.abstractmethod
    def _product(self, vectors: Blocks, out: Blocks) -> None:
        """Write the products with the vectors of one pass to `out`."""

    @abc.abstractmethod
    def _quad(self, vectors: Blocks) -> Tensor:
        """The forms of the vectors of one pass, [K]."""

    @torch.no_grad()
    def products(self, vectors: Blocks) -> Blocks:
        out = list(map(empty_product, vectors))
        for part in self._parts(vectors):
            self._product([v[part] for v in vectors], [o[part] for o in out])
        return out

    @torch.no_grad()
    def quad(self, vectors: Blocks) -> Tensor:
        return torch.cat([self._quad([v[part] for v in vectors]) for part in self._parts(vectors)])

    def _parts(self, vectors: Blocks) -> list[slice]:
        return [slice(k, k + self.chunk) for k in range(0, len(vectors[0]), self.chunk)]
