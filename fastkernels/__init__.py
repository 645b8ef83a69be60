"""Fused kernels for regularised updates and curvature products: tensors in, tensors out."""
