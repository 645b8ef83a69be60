"""Fused kernels for regularised updates and curvature products: tensors in, tensors out."""

from fastkernels import codes
from fastkernels.op import explain
from fastkernels.ops.cross_entropy_hvp import cross_entropy_hvp_, cross_entropy_quad
from fastkernels.ops.update import anchored_adamw_, anchored_sgd_

__all__ = [
    "anchored_adamw_",
    "anchored_sgd_",
    "codes",
    "cross_entropy_hvp_",
    "cross_entropy_quad",
    "explain",
]
