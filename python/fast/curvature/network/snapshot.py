"""Snapshots tell whether a model and its data have changed since something was kept of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

# Row length of the checksum: long enough that the row sums are cheap to keep and to compare.
COLUMNS = 1024
# Tensors of up to this many elements are copied into one, and get one checksum: with one each,
# those of 12 transformer blocks of width 64 took a third of the time of a product with one vector.
SMALL = 2**15
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_GLOBAL_HOOKS = (
    module_hooks._global_forward_hooks,
    module_hooks._global_forward_pre_hooks,
)


class Watch:
    """Tells whether modules still have the parts, modes, hooks and attributes that they had.

    They are compared by identity. The watch looks into containers and plain objects (such as a
    configuration) that are attributes, one level deep. It does not see what lies deeper, in
    closures or in global variables.
    """

    def __init__(self, *modules: nn.Module):
        containers = [*_GLOBAL_HOOKS, *chain.from_iterable(map(_containers, modules))]
        self.dicts = [c for c in containers if isinstance(c, dict)]
        self.others = [c for c in containers if not isinstance(c, dict)]
        self.sizes = self._sizes()
        self.contents = list(self._contents())

    def _sizes(self) -> list[int]:
        return list(map(len, (*self.dicts, *self.others)))

    def _contents(self) -> Iterator[Any]:
        """Everything inside the containers."""
        values = chain.from_iterable(map(dict.values, self.dicts))
        return chain(values, chain.from_iterable(self.others))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        return self._sizes() == self.sizes and all(
            map(operator.is_, self._contents(), self.contents)
        )

    def tensors(self) -> list[Tensor]:
        """Parameters, buffers, and tensors that are other attributes, once each."""
        return list({id(t): t for t in self.contents if isinstance(t, Tensor)}.values())


def _containers(model: nn.Module) -> Iterator[Any]:
    """The attributes of all modules, and the containers and objects among them."""
    for module in model.modules():
        attributes = vars(module)
        yield attributes
        for value in attributes.values():
            if isinstance(value, dict | list | set):
                yield value
            elif _is_record(value):
                yield vars(value)


def _is_record(value: Any) -> bool:
    """Whether a value is an object that only holds other values."""
    return hasattr(value, "__dict__") and not (
        isinstance(value, nn.Module | Tensor | type) or callable(value)
    )


class Snapshot:
    """The state of a model and of other things: tensors, modules and plain values.

    A tensor is described by its address, its version, and a checksum of its values that depends on
    their places and signs, because writes through `.data` and by native kernels bump no version.
    Modules are watched. What a function or another kind of object reads is not seen.
    """

    def __init__(self, model: nn.Module, others: Sequence[Any]):
        self.watch = Watch(model, *(o for o in others if isinstance(o, nn.Module)))
        self.state = self._state(others)

    def holds(self, others: Sequence[Any]) -> bool:
        """Whether the model, and the others, are as they were."""
        return self.watch.holds() and _same(self.state, self._state(others))

    def _state(self, others: Sequence[Any]) -> list[Any]:
        tensors: list[Tensor] = []
        parts: list[Any] = []
        for thing in (*self.watch.tensors(), *others):
            if isinstance(thing, Tensor):
                parts += _place(thing, tensors)
            else:
                parts.append(thing if is_plain(thing) else id(thing))
        return [*parts, *_checksums(tensors)]


def _same(a: list[Any], b: list[Any]) -> bool:
    """Whether two states are equal; NaN equals nothing."""
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
    if t.layout is not torch.strided or t.is_meta:
        return [(id(t), version)]
    if t.numel():
        tensors.append(t.detach())
    return [(t.data_ptr(), version, t.shape, t.stride(), t.dtype)]


@torch.no_grad()
def _checksums(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
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
