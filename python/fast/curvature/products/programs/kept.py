"""A record that is kept: its passes become code once they have come a few times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast.curvature.network.parameter_space import Blocks
from fast.curvature.products.batched.linearize import Folded
from fast.curvature.products.batched.passes import Passes, untraced
from fast.curvature.products.programs.program import Run
from fast.curvature.products.programs.source import Source
from fast.curvature.products.programs.tracer import Tracer

# A pass is traced when it comes for the 8th time. For 12 transformer blocks of width 64, a trace
# costs 25 gradients of Python, and each pass by code saves one to three; for large networks both
# are little.
TRACED_AT = 8


class Kept(Passes):
    """The record of one batch, for many products with any number of vectors.

    Products push tangents through the record's rules at first, and run their trace later on: what
    the rules read is fixed, so that only vectors and tangents are inputs of the code.
    """

    def __init__(self, record: Folded, *, compile: bool = False):
        self.compile = compile
        self.record, self.exact, self.chunk = record, record.exact, record.chunk
        self.answers, self.weight = record.answers, record.weight
        self._times: Counter[Any] = Counter()
        self._runs: dict[Any, Run] = {}

    def _product(self, vectors: Blocks, out: Blocks) -> None:
        key = "product", len(vectors[0])
        if key not in self._runs:
            self._traced_in_time(key, lambda: self.record._product(vectors, out))
            return
        run = self._runs[key]
        (u,) = run(0, *vectors)
        run(1, self.record.curvature.product(u), *out)
        run.end_pass()

    def _quad(self, vectors: Blocks) -> Tensor:
        key = "form", len(vectors[0])
        if key not in self._runs:
            return self._traced_in_time(key, lambda: self.record._quad(vectors))
        run = self._runs[key]
        u, *terms = run(0, *vectors)
        run.end_pass()
        return sum(terms, self.record.curvature.quad(u))

    def _traced_in_time(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A pass by the rules; which are written down once they have come often."""
        self._times[key] += 1
        if self._times[key] != TRACED_AT:
            return compute()
        tracer = Tracer(fixed=True)
        self.record.segment = tracer.segment
        try:
            result = compute()
        finally:
            self.record.segment = untraced
        if not tracer.why:
            self._runs[key] = Run(Source(tracer.trace, [0], compile=self.compile))
        return result
