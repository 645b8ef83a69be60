"""What the backends of compiled kernels have in common."""

from __future__ import annotations

from types import ModuleType

# A module, or None, and what is (or is not) there.
ModuleOrReason = tuple[ModuleType | None, str]


def module_of(result: ModuleOrReason, kernels: str) -> ModuleType:
    """The module.

    Raises:
        RuntimeError: it is not there; the message says how to get it.
    """
    module, reason = result
    if module is None:
        raise RuntimeError(f"the {kernels} kernels are {reason}")
    return module
