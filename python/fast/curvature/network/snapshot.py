"""Snapshots that tell whether a model and its data have changed since a linearisation was kept."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Row length of the checksum: long enough that the row sums are cheap to keep and to compare.
COLUMNS = 1024
# Tensors of up to this many elements are copied into one, and get one checksum: with one each,
# those of 12 transformer blocks of width 64 took a third of the time of a product with one vector.
SMALL = 2**15
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(*things: Any) -> list[Any]:
    """A description of tensors, modules, and lists of both, to compare by `same`.

    A tensor is described by its address, its version, and a checksum of its values that depends on
    their places and signs, because writes through `.data` and by native kernels bump no version. A
    module is described by its parts, modes, hooks and plain attributes. What a function or another
    kind of object reads is not seen.
    """
    tensors: list[Tensor] = []
    parts = _described(things, tensors)
    return [*parts, *_checksums(tensors)]


def _described(things: Iterable[Any], tensors: list[Tensor]) -> list[Any]:
    """All but the values of the tensors, which are added to `tensors`."""
    parts: list[Any] = []
    for thing in things:
        if isinstance(thing, Tensor):
            parts += _place(thing, tensors)
        elif isinstance(thing, nn.Module):
            for module in thing.modules():
                parts.append(_module(module))
                parts += _described(_tensors(module), tensors)
        elif isinstance(thing, list | tuple):
            parts += _described(thing, tensors)
        else:
            parts.append(thing if is_plain(thing) else id(thing))
    return parts


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two snapshots are equal; NaN equals nothing."""
    if len(a) != len(b):
        return False
    # Checksums of one dtype and device are compared at once: each comparison waits for a GPU.
    sums: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            kind = (x.dtype, x.device)
            if kind != (y.dtype, y.device) or x.shape != y.shape:
                return False
            xs, ys = sums.setdefault(kind, ([], []))
            xs.append(x)
            ys.append(y)
        elif isinstance(x, Tensor) or isinstance(y, Tensor) or x != y:
            return False
    return all(torch.equal(torch.cat(xs), torch.cat(ys)) for xs, ys in sums.values())


def _place(t: Tensor, tensors: list[Tensor]) -> list[Any]:
    """Where a tensor lies, and how; it is added to `tensors`, whose values are described later."""
    if t.is_nested:
        return [id(t), *(x for part in t.unbind() for x in _place(part, tensors))]
    version = None if t.is_inference() else t._version
    if not _dense(t):
        return [(id(t), version)]
    if t.numel():
        tensors.append(t.detach())
    return [(t.data_ptr(), version, t.shape, t.stride(), t.dtype)]


def _dense(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_meta


@torch.no_grad()
def _checksums(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The checksums of large tensors, and of all small ones of a type together."""
    together: dict[Any, list[Tensor]] = {}
    for t in tensors:
        flat = _flat(t)
        if flat.numel() <= SMALL:
            together.setdefault((flat.dtype, flat.device), []).append(flat)
        else:
            yield checksum(flat)
    for flats in together.values():
        yield checksum(torch.cat(flats))


def _flat(t: Tensor) -> Tensor:
    flat = t.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.is_floating_point() and flat.element_size() >= 4:
        return flat
    return flat.to(torch.float64)  # exact for integers and for half precision


@torch.no_grad()
def checksum(t: Tensor) -> Tensor:
    """Row sums of the values times fixed factors: one pass over the memory."""
    flat = _flat(t)
    whole = flat.numel() // COLUMNS * COLUMNS
    weights = _factors(flat.dtype, flat.device)
    rest = (flat[whole:] @ weights[: flat.numel() - whole])[None]
    return torch.cat([flat[:whole].view(-1, COLUMNS) @ weights, rest])


@functools.cache
def _factors(dtype: torch.dtype, device: torch.device) -> Tensor:
    steps = torch.arange(1, COLUMNS + 1, dtype=torch.float64)
    # Multiples of an irrational number, between 1 and 2: no two are equal, none is zero.
    return (1 + (steps * 0.6180339887498949) % 1).to(device, dtype)


def is_plain(value: Any) -> bool:
    """Whether a value can be compared by ==: a number, a string, or the like."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


def _tensors(module: nn.Module) -> Iterable[Any]:
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    yield from (v for v in vars(module).values() if isinstance(v, Tensor))


def _module(module: nn.Module) -> tuple[Any, ...]:
    """A module without its tensors."""
    attributes = vars(module)
    plain = [v for v in attributes.values() if is_plain(v)]
    hooks = [tuple(map(id, attributes[h].values())) for h in _HOOKS if attributes[h]]
    return (id(module), type(module), id(attributes.get("forward")), plain, hooks)
