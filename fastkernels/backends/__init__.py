"""Where kernels can run: each module says whether its backend is there, and the reason."""

from fastkernels.backends import cuda, native, triton

__all__ = ["cuda", "native", "triton"]
