"""Fused kernels for regularised updates and curvature products: tensors in, tensors out."""

from fastkernels._backends import explain
from fastkernels.ops.anchored_adamw import anchored_adamw_
from fastkernels.ops.anchored_sgd import anchored_sgd_
from fastkernels.ops.cross_entropy_hvp import cross_entropy_hvp_, cross_entropy_quad

__all__ = [
    "anchored_adamw_",
    "anchored_sgd_",
    "cross_entropy_hvp_",
    "cross_entropy_quad",
    "explain",
]
