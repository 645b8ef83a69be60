"""The compiled CUDA kernels, `fastkernels._C_cuda`: the module, or the reason why it is missing."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from fastkernels.backends.compiled import ModuleOrReason, module_of


@functools.cache
def load() -> ModuleOrReason:
    """The module, or None, and what is (or is not) there. Nothing is compiled here."""
    if not torch.cuda.is_available():
        return None, "torch finds no CUDA device"
    try:
        from fastkernels import _C_cuda  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"not built ({error}); install nvcc and install again with FAST_CUDA=1"
    return _C_cuda, "compiled, CUDA C++"


def available() -> tuple[bool, str]:
    module, reason = load()
    return module is not None, reason


def module() -> ModuleType:
    """The compiled module; raises RuntimeError where it is not there."""
    return module_of(load(), "CUDA")
