"""The compiled CPU kernels, `fastkernels._C`: the module, or the reason why it is missing."""

from __future__ import annotations

import functools
from types import ModuleType

# First: torch brings the OpenMP runtime that `_C` then shares, and with it one thread pool.
import torch  # noqa: F401

from fastkernels.backends.compiled import ModuleOrReason, module_of


@functools.cache
def load() -> ModuleOrReason:
    """The module, or None, and what is (or is not) there. Nothing is compiled here."""
    try:
        from fastkernels import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, (
            f"not built ({error}); install a C++17 compiler (g++ or clang++) and install again "
            "with FAST_REQUIRE_NATIVE=1, which shows what fails"
        )
    return _C, f"compiled, {_C.cpu_instruction_set()}"


def available() -> tuple[bool, str]:
    module, reason = load()
    return module is not None, reason


def module() -> ModuleType:
    """The compiled module; raises RuntimeError where it is not there."""
    return module_of(load(), "native")
