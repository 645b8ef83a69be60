"""The anchored updates in Triton: `run` steps a call.

`kernels` has the kernels, which load and store by `forms` and compute by `rules`; `launch` chooses
what they are compiled for, and starts them.
"""

from fastkernels.ops.update.triton.launch import run

__all__ = ["run"]
