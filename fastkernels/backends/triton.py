"""Whether Triton kernels can run: a driver for CUDA tensors, the interpreter for CPU tensors."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def interpreting() -> bool:
    """Whether Triton was asked to interpret kernels (it reads this when it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def available() -> tuple[bool, str]:
    """For CUDA tensors."""
    if reason := _missing():
        return False, reason
    if interpreting():
        return False, "TRITON_INTERPRET=1 runs kernels on the CPU; unset it"
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    return True, "compiled on first use"


def available_on_cpu() -> tuple[bool, str]:
    """For CPU tensors: slowly, to test kernels without a GPU."""
    if reason := _missing():
        return False, reason
    if not interpreting():
        return False, "on the CPU only in the interpreter: TRITON_INTERPRET=1"
    return True, "interpreted"
