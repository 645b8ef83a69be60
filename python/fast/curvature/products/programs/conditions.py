"""What a program depends on besides the model: its inputs' make-up, the modes of torch, and random
numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fast.curvature.network.batches import Batch
from fast.curvature.network.snapshot import is_plain


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
