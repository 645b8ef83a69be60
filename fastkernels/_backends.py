"""Which implementation of an op runs where, and why another one does not.

`FASTKERNELS_BACKEND` (reference | native | triton) forces one; it is read at every choice, so
a test can set it. `explain()` says what is there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ENVIRONMENT = "FASTKERNELS_BACKEND"


class BackendError(RuntimeError):
    """There is no implementation of an op that may run."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op: `function` of the module `module`, for tensors on `device`."""

    op: str
    name: str
    device: str
    module: str
    function: str
    available: Callable[[], tuple[bool, str]]

    def load(self) -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return loaded


@dataclass(frozen=True)
class Row:
    """One line of `explain()`."""

    op: str
    backend: str
    device: str
    available: bool
    reason: str


_BACKENDS: list[Backend] = []
_loaded: dict[Backend, Callable[..., Any]] = {}


def always() -> tuple[bool, str]:
    return True, "plain torch"


def register(
    op: str,
    name: str,
    devices: tuple[str, ...],
    module: str,
    available: Callable[[], tuple[bool, str]] = always,
    function: str | None = None,
) -> None:
    """Add a backend for `op`; those added first are preferred. Its module loads on first use."""
    for device in devices:
        _BACKENDS.append(Backend(op, name, device, module, function or op, available))


def candidates(op: str, device: str) -> list[Backend]:
    return [b for b in _BACKENDS if b.op == op and b.device == device]


def choose(op: str, device: str) -> Callable[..., Any]:
    """The function that runs `op` on `device` ("cpu", "cuda").

    Raises:
        BackendError: FASTKERNELS_BACKEND names a backend that is not there; the message says why.
    """
    forced = os.environ.get(ENVIRONMENT)
    found = candidates(op, device)
    refusals = []
    for backend in found:
        if forced and backend.name != forced:
            continue
        if backend in _loaded:
            return _loaded[backend]
        ok, reason = backend.available()
        if ok:
            return _loaded.setdefault(backend, backend.load())
        refusals.append(f"{backend.name}: {reason}")
    asked = f"{ENVIRONMENT}={forced}" if forced else f"the device {device!r}"
    why = "; ".join(refusals) or f"backends there are: {[b.name for b in found] or 'none'}"
    raise BackendError(f"{op} has no backend for {asked}: {why}")


def explain() -> list[Row]:
    """Every op, backend and device, whether it can run here, and the reason."""
    rows = []
    for b in _BACKENDS:
        ok, reason = b.available()
        rows.append(Row(b.op, b.name, b.device, ok, reason))
    return rows
