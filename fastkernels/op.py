"""What an operator is: a public function, its schema, its fake, and the backends that run it.

The decorator `operator` makes one of a function: it derives the schema from the signature,
registers schema, implementation and fake with torch.library, and keeps a record in `OPS`. The
function checks its arguments and calls `choose` for the backend of their device.

`FASTKERNELS_BACKEND` (reference | native | triton) forces a backend; it is read at every choice, so
a test can set it. `explain()` lists the backends.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

NAMESPACE = "fastkernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
ENVIRONMENT = "FASTKERNELS_BACKEND"

P = ParamSpec("P")
R = TypeVar("R")


class BackendError(RuntimeError):
    """No implementation of an op can run here, or the one that was asked for cannot."""


def always() -> tuple[bool, str]:
    return True, "plain torch"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation: `function` of the module `module`, for tensors on `device`.

    `available` says whether it can run here, and the reason. The module loads on first use.
    """

    name: str
    device: str
    module: str
    function: str
    available: Callable[[], tuple[bool, str]] = always

    def load(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operator; `backends` are in order of preference."""

    name: str
    schema: str
    fake: Callable[..., Any]
    backends: tuple[Backend, ...]


@dataclass(frozen=True, kw_only=True)
class Availability:
    """One line of `explain()`: whether a backend of an op can run here, and the reason."""

    op: str
    backend: str
    device: str
    available: bool
    reason: str


OPS: dict[str, Op] = {}
_functions: dict[Backend, Callable[..., Any]] = {}


def operator(
    *,
    fake: Callable[..., Any],
    mutates: tuple[str, ...],
    backends: tuple[Backend, ...],
    direct: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of the public function of an op, which checks its arguments and runs a backend.

    Args:
        fake: the function for tensors without memory.
        mutates: the parameters whose tensors are written.
        backends: the implementations, in order of preference.
        direct: tells whether a call may bypass torch's dispatcher and go to the function itself; it
            is called with the op's name and the call's arguments.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        schema = schema_of(function, mutates)
        OPS[name] = Op(name=name, schema=schema, fake=fake, backends=backends)
        LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        dispatcher = getattr(torch.ops.fastkernels, name)
        # The dispatcher cannot give a list a default.
        parameters = inspect.signature(function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

        @functools.wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            if direct is not None and direct(name, *args, **keywords):
                return function(*args, **keywords)
            result: R = dispatcher(*args, **{**defaults, **keywords})
            return result

        return call

    return register


_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Sequence[Tensor]": "Tensor[]",
    "Sequence[Tensor | None]": "Tensor?[]",
    "Sequence[int]": "int[]",
    "float | None": "float?",
    "int": "int",
    "None": "()",
}


def schema_of(function: Callable[..., Any], mutates: tuple[str, ...]) -> str:
    """The signature of `function` as torch writes it.

    An optional list is empty if its feature is off. An absent entry is None in a read-only list,
    and a tensor of 0 elements in a mutated list, which cannot hold None.
    """
    signature = inspect.signature(function)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    parameters = []
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        kind = _TYPES[p.annotation]
        if p.name in mutates:
            kind = kind.replace("Tensor", f"Tensor({next(letters)}!)")
        default = "" if p.default in (p.empty, ()) else f"={p.default}"
        parameters.append(f"{kind} {p.name}{default}")
    result = _TYPES[signature.return_annotation]
    return f"{function.__name__}({', '.join(parameters)}) -> {result}"


def candidates(op: str, device: str) -> list[Backend]:
    """The backends of `op` for `device`, the preferred one first."""
    return [b for b in OPS[op].backends if b.device == device]


def choose(op: str, device: str) -> Callable[..., Any]:
    """The function that runs `op` on `device` ("cpu", "cuda").

    Raises:
        BackendError: FASTKERNELS_BACKEND names a backend that is not there; the message says why.
    """
    choice = os.environ.get(ENVIRONMENT)
    backends = candidates(op, device)
    refusals = []
    for backend in backends:
        if choice and backend.name != choice:
            continue
        if backend in _functions:
            return _functions[backend]
        ok, reason = backend.available()
        if ok:
            return _functions.setdefault(backend, backend.load())
        refusals.append(f"{backend.name}: {reason}")
    what = f"{ENVIRONMENT}={choice}" if choice else f"the device {device!r}"
    why = "; ".join(refusals) or f"backends there are: {[b.name for b in backends] or 'none'}"
    raise BackendError(f"{op} has no backend for {what}: {why}")


def explain() -> list[Availability]:
    """Every op, backend and device, whether it can run here, and the reason."""
    rows = []
    for op in OPS.values():
        for b in op.backends:
            ok, reason = b.available()
            rows.append(
                Availability(
                    op=op.name, backend=b.name, device=b.device, available=ok, reason=reason
                )
            )
    return rows
