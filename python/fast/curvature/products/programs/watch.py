"""What a network's code depends on besides the values of tensors, in forms that compare fast."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree

from fast.curvature.network.batches import Batch
from fast.curvature.network.snapshot import is_plain

_GLOBAL_HOOKS = (
    module_hooks._global_forward_hooks,
    module_hooks._global_forward_pre_hooks,
)


class Watch:
    """Tells whether a model still has the parts, modes, hooks and attributes that it had.

    They are compared by identity. The watch looks into containers and plain objects (such as a
    configuration) that are attributes, one level deep. It does not see what lies deeper, in
    closures or in global variables.
    """

    def __init__(self, model: nn.Module):
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        containers = [*_containers(model)]
        self.dicts = [c for c in containers if isinstance(c, dict)]
        self.others = [c for c in containers if not isinstance(c, dict)]
        self.sizes = list(map(len, self.dicts)), list(map(len, self.others))
        self.contents = list(self._contents())

    def _contents(self) -> Iterator[Any]:
        """Everything inside the containers."""
        values = chain.from_iterable(map(dict.values, self.dicts))
        return chain(values, chain.from_iterable(self.others))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        sizes = list(map(len, self.dicts)), list(map(len, self.others))
        return sizes == self.sizes and all(map(operator.is_, self._contents(), self.contents))

    def attributes(self) -> list[Tensor]:
        """Tensors that are neither parameters nor buffers, once each."""
        tensors = {id(t): t for t in self.contents if isinstance(t, Tensor)}
        return [t for i, t in tensors.items() if i not in self._own]


def _containers(model: nn.Module) -> Iterator[Any]:
    """The attributes of all modules, and the containers and objects among them."""
    yield from _GLOBAL_HOOKS
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


def draws() -> tuple[Any, ...]:
    """The state of the random generators that torch does not seed."""
    return random.getstate(), repr(np.random.get_state(legacy=False))


def shapes(tensors: list[Tensor]) -> list[Any] | None:
    """What code can learn of tensors without reading them; None where one is of a special kind."""
    if any(
        type(t) not in (Tensor, nn.Parameter) or t.is_nested or t.layout is not torch.strided
        for t in tensors
    ):
        return None
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def make_up(batch: Batch) -> tuple[Any, ...]:
    """Everything about the inputs but their tensors: where those are, and which are the same."""
    leaves, tree = pytree.tree_flatten(batch.inputs)
    places = {id(t): i for i, t in reversed([*enumerate(leaves)])}
    return tree, tuple(
        places[id(t)] if isinstance(t, Tensor) else (type(t), t if is_plain(t) else id(t))
        for t in leaves
    )


def modes(device: torch.device) -> tuple[Any, ...]:
    """The settings of torch that decide which operations its functions call."""
    cast = torch.is_autocast_enabled(device.type)
    return (
        cast and torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )
