"""What an object holds and runs: the generators, the code and the plain values behind it."""

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
# Their versions are compared instead.
LIBRARIES = {"torch", "numpy", "builtins", "abc", "typing", "collections", "functools", "fast"}
TORCH_PARTS = (nn.Module, Dataset, DataLoader, Sampler)
MOST_OBJECTS = 200_000


def reachable(**roots: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of all that can be reached from `roots`, in an order that is always the same.

    Through attributes, containers, closures, defaults, bound methods, the methods of classes that
    are no library's, and the globals that their code names. Not into tensors and arrays; no further
    than `MOST_OBJECTS`.
    """
    waiting = list(reversed(roots.items()))
    seen: dict[int, Any] = {}  # holds them, so that no id is given twice
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
        # torch numbers hooks as they are made in a process.
        names = ((k if isinstance(k, str) else str(i), v) for i, (k, v) in enumerate(value.items()))
        yield from names
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), v) for i, v in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from _behind(value)
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


def _behind(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
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

    Of bytecode: comments and the place of a function in its file do not count, nor the name that a
    module is imported by. Another version of Python has other bytecode.
    """
    digest, found = hashlib.blake2b(digest_size=8), False
    for _, value in reachable(**roots):
        if isinstance(value, types.FunctionType) and _foreign(value.__module__):
            _feed(digest, value.__code__)
            found = True
        elif isinstance(value, (types.BuiltinFunctionType, type)):
            digest.update(f"{value.__qualname__}\n".encode())
            found = True
    return digest.hexdigest() if found else None


def _foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] not in LIBRARIES


def _feed(digest: Any, code: types.CodeType) -> None:
    digest.update(f"{code.co_name} {code.co_names} {code.co_varnames}\n".encode() + code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _feed(digest, constant)
        elif isinstance(constant, frozenset):  # in the order of this process
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(repr(constant).encode())


def values_of(**roots: Any) -> str:
    """Hash of the plain values that can be reached, by their paths.

    Not of `training`, which every loop sets, nor of what starts with two underscores.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, value in reachable(**roots):
        name = path.rpartition(".")[2]
        if isinstance(value, PLAIN) and name != "training" and not name.startswith("__"):
            digest.update(f"{path} {value!r}\n".encode())
    return digest.hexdigest()
