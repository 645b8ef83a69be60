"""The derivative of every operation that the record understands, for K tangents at once."""

from fast.curvature.products.rules import (  # noqa: F401  (importing registers the rules)
    attention,
    convolution,
    matmul,
    norm,
    pointwise,
    reduce,
    shape,
)
from fast.curvature.products.rules.base import (
    BY_FIRST,
    NO_FAULT,
    RULES,
    Call,
    RuleError,
    UnsupportedOperation,
    decomposition,
)

__all__ = [
    "BY_FIRST",
    "NO_FAULT",
    "RULES",
    "Call",
    "RuleError",
    "UnsupportedOperation",
    "decomposition",
]
