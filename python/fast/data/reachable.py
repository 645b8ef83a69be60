"""Everything that an object holds and runs: generators, code and plain values."""

from __future__ import annotations

import functools
import hashlib
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
PLAIN = (bool, int, float, complex, str, bytes, type(None))
# The code of these is not looked at: a run compares their versions.
LIBRARIES = {"torch", "numpy", "builtins", "abc", "typing", "collections", "functools", "fast"}
TORCH_PARTS = (nn.Module, Dataset, DataLoader, Sampler)
MOST_OBJECTS = 200_000


def reachable(**roots: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that can be reached from `roots`, always in the same order.

    The search follows attributes, containers, closures, defaults, bound methods, the methods of
    classes that are no library's, and the globals that their code names. It does not look into
    tensors and arrays, and ends after `MOST_OBJECTS`.
    """
    waiting = list(reversed(roots.items()))
    seen: dict[int, Any] = {}  # keeps the values alive, so that no id is used twice
    while waiting and len(seen) < MOST_OBJECTS:
        path, value = waiting.pop()
        if isinstance(value, PLAIN):
            yield path, value
            continue
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield path, value
        if not isinstance(value, (*GENERATORS, Tensor, np.ndarray, types.ModuleType)):
            parts = [(f"{path}.{name}", part) for name, part in _parts(value)]
            waiting += reversed(parts)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
        # Keys that are no strings may differ between processes: torch numbers its hooks.
        names = ((k if isinstance(k, str) else str(i), v) for i, (k, v) in enumerate(value.items()))
        yield from names
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), v) for i, v in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from _inside_function(value)
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("function", value.__func__))
    elif isinstance(value, functools.partial):
        yield from (("function", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, type):
        if value.__module__.partition(".")[0] not in LIBRARIES:
            yield from _methods(value)
            yield from ((base.__name__, base) for base in value.__bases__)
    elif _foreign(type(value).__module__) or isinstance(value, TORCH_PARTS):
        yield "class", type(value)
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    yield name, getattr(value, name)


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    for name, part in vars(kind).items():
        if isinstance(part, (staticmethod, classmethod)):
            part = part.__func__
        elif isinstance(part, property):
            part = part.fget
        if isinstance(part, types.FunctionType) or (
            isinstance(part, (*PLAIN, *GENERATORS)) and not name.startswith("__")
        ):
            yield name, part


def _inside_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    for name in _names(function.__code__):
        part = function.__globals__.get(name)
        if isinstance(part, (*PLAIN, *GENERATORS)) or (
            getattr(part, "__module__", None) == function.__module__
        ):
            yield name, part


def _names(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return sorted({*code.co_names, *(name for c in inner for name in _names(c))})


def code_of(**roots: Any) -> str | None:
    """Hash of the code of all functions that can be reached; None where there are none.

    Bytecode is hashed: comments and the place of a function in its file do not count, nor the name
    by which a module is imported. Another version of Python has other bytecode.
    """
    digest, has_code = hashlib.blake2b(digest_size=8), False
    for _, value in reachable(**roots):
        if isinstance(value, types.FunctionType) and _foreign(value.__module__):
            _feed(digest, value.__code__)
            has_code = True
        elif isinstance(value, (types.BuiltinFunctionType, type)):
            digest.update(f"{value.__qualname__}\n".encode())
            has_code = True
    return digest.hexdigest() if has_code else None


def _foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] not in LIBRARIES


def _feed(digest: Any, code: types.CodeType) -> None:
    digest.update(f"{code.co_name} {code.co_names} {code.co_varnames}\n".encode() + code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _feed(digest, constant)
        elif isinstance(constant, frozenset):  # whose order differs between processes
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(repr(constant).encode())


def values_of(**roots: Any) -> str:
    """Hash of the plain values that can be reached, and of their paths.

    It leaves out `training`, which every loop sets, and names that begin with two underscores.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, value in reachable(**roots):
        name = path.rpartition(".")[2]
        if isinstance(value, PLAIN) and name != "training" and not name.startswith("__"):
            digest.update(f"{path} {value!r}\n".encode())
    return digest.hexdigest()
