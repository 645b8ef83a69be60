"""Products with K vectors at once: one pass over a gradient's operations, with [K, ...] tangents.

The gradient of a batch is computed once, and every tensor operation that depends on the parameters
is recorded together with its derivative at this point (`recorder`). Products then push K tangents
through the record: matrix products and convolutions with K folded into one of their dimensions,
everything else in one elementwise pass (`rules`, one module per kind of operation). An operation
without a rule is an `UnsupportedOperation`, and the caller takes the kept-graph loop instead.
"""

from fast.curvature.products.batched.linearize import Folded, FoldedGGN, FoldedHessian
from fast.curvature.products.rules import RuleError, UnsupportedOperation

__all__ = ["Folded", "FoldedGGN", "FoldedHessian", "RuleError", "UnsupportedOperation"]
