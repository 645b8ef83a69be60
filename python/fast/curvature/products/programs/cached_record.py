"""A record that is kept from product to product: passes that come often become code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fast.curvature.network.parameter_space import Blocks
from fast.curvature.products.batched import Folded
from fast.curvature.products.batched.passes import Passes
from fast.curvature.products.programs.code import Code
from fast.curvature.products.programs.program import Execution
from fast.curvature.products.programs.tracer import Tracer

# A pass is traced when it comes for the 8th time. For 12 transformer blocks of width 64, a trace
# costs 25 gradients of Python, and each pass by code saves one to three; for large networks both
# are little.
TRACED_AT = 8


class CachedRecord(Passes):
    """The record of one batch, for many products with any number of vectors.

    Products push tangents through the record's rules at first, and run their trace later on: what
    the rules read is fixed, so that only vectors and tangents are inputs of the code.

    Attributes:
        executions: the code of passes, by their kind and number of vectors.
    """

    def __init__(self, record: Folded, *, compile: bool = False):
        self.compile = compile
        self.record, self.chunk = record, record.chunk
        self.answers, self.weight = record.answers, record.weight
        self._times: Counter[Any] = Counter()
        self.executions: dict[Any, Execution] = {}

    def product_pass(self, vectors: Blocks, out: Blocks) -> None:
        key = "product", len(vectors[0])
        if key not in self.executions:
            self._by_rules(key, lambda: self.record.product_pass(vectors, out))
            return
        self.executions[key].product(0, self.record.curvature, vectors, out)

    def form_pass(self, vectors: Blocks) -> Tensor:
        key = "form", len(vectors[0])
        if key not in self.executions:
            form: Tensor = self._by_rules(key, lambda: self.record.form_pass(vectors))
            return form
        return self.executions[key].form(0, self.record.curvature, vectors)

    def _by_rules(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, a pass by the rules; it is traced where it has come often enough.

        Args:
            key: kind of the pass and number of vectors.
        """
        self._times[key] += 1
        if self._times[key] != TRACED_AT:
            return compute()
        tracer = Tracer(only_constants=True)
        with self.record.traced(tracer.segment):
            result = compute()
        if not tracer.why:
            self.executions[key] = Execution(Code(tracer.trace, [0], compile=self.compile))
        return result
