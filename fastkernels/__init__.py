"""Fused kernels for regularised updates and curvature products: tensors in, tensors out."""

from fastkernels._backends import explain
from fastkernels.ops.anchored_adamw import anchored_adamw_
from fastkernels.ops.anchored_sgd import anchored_sgd_

__all__ = ["anchored_adamw_", "anchored_sgd_", "explain"]
