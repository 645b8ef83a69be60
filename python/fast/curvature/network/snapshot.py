"""Whether what a kept linearisation was made of is still the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Columns of the checksum: long enough that the row sums are cheap to keep and to compare.
COLUMNS = 1024
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(*things: Any) -> list[Any]:
    """Of tensors, modules, and lists of both: equal (see `same`) while nothing of them changed.

    Of a tensor: where it lies, its version, and a checksum of its values that knows their places
    and signs, because writes through `.data` and by native kernels bump no version. Of a module:
    its parts, modes, hooks and plain attributes. Unseen: what a function or another object that is
    none of these reads.
    """
    found: list[Any] = []
    for thing in things:
        if isinstance(thing, Tensor):
            found += _tensor(thing)
        elif isinstance(thing, nn.Module):
            for module in thing.modules():
                found.append(_module(module))
                found += snapshot(*_tensors(module))
        elif isinstance(thing, list | tuple):
            found += snapshot(*thing)
        else:
            found.append(thing if _plain(thing) else id(thing))
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two snapshots are equal; nan is not."""
    if len(a) != len(b):
        return False
    # Checksums of one kind are compared at once: on a GPU each comparison waits for the device.
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


def _tensor(t: Tensor) -> list[Any]:
    if t.is_nested:
        return [id(t), *(found for part in t.unbind() for found in _tensor(part))]
    version = None if t.is_inference() else t._version
    where = (t.data_ptr(), version, t.shape, t.stride(), t.dtype) if _dense(t) else (id(t), version)
    return [where, checksum(t.detach())] if _dense(t) and t.numel() else [where]


def _dense(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_meta


@torch.no_grad()
def checksum(t: Tensor) -> Tensor:
    """Sums of rows of the values times fixed factors: one pass over the memory."""
    flat = t.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if not (flat.is_floating_point() and flat.element_size() >= 4):
        flat = flat.to(torch.float64)  # integers exactly, and half precision with all its bits
    whole = flat.numel() // COLUMNS * COLUMNS
    weights = _factors(flat)
    rest = (flat[whole:] @ weights[: flat.numel() - whole])[None]
    return torch.cat([flat[:whole].view(-1, COLUMNS) @ weights, rest])


_kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _factors(like: Tensor) -> Tensor:
    key = (like.dtype, like.device)
    if key not in _kept:
        steps = torch.arange(1, COLUMNS + 1, dtype=torch.float64)
        # Multiples of an irrational number, between 1 and 2: no two are equal, none is zero.
        _kept[key] = (1 + (steps * 0.6180339887498949) % 1).to(like.device, like.dtype)
    return _kept[key]


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return isinstance(value, _PLAIN)


def _tensors(module: nn.Module) -> Iterable[Any]:
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    yield from (v for v in vars(module).values() if isinstance(v, Tensor))


def _module(module: nn.Module) -> tuple[Any, ...]:
    attributes = vars(module)
    plain = [v for v in attributes.values() if _plain(v)]
    hooks = [tuple(map(id, attributes[h].values())) for h in _HOOKS if attributes[h]]
    return (id(module), type(module), id(attributes.get("forward")), plain, hooks)
