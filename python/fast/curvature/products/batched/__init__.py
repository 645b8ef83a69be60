"""Products with K vectors at once: the gradient is recorded, and K tangents run through the record.

The gradient of a batch is computed once, and every tensor operation that depends on the parameters
is recorded together with its derivative at this point. Products then push tangents [K, ...] through
the record: matrix products and convolutions have K folded into one of their dimensions, and
everything else is one elementwise operation. An operation without a rule is an
`UnsupportedOperation`, and the caller takes the kept-graph loop instead.

The modules, from the bottom up: `tape` (recorded operations), `recorder` (sees them and writes
them down), `gradient_record` (the record of one batch), `tangent_pass` (tangents run through a part
of it), `forms` (v^T H v at half the cost), `passes` (any number of vectors, a few at a time), and
`folded`, which puts these together.
"""

from fast.curvature.products.batched.folded import Folded, FoldedGGN, FoldedHessian
from fast.curvature.products.rules import RuleError, UnsupportedOperation

__all__ = ["Folded", "FoldedGGN", "FoldedHessian", "RuleError", "UnsupportedOperation"]
