"""What operations of torch do besides computing numbers, by their schemas and tags."""

from __future__ import annotations

import functools
from typing import Any

import torch

aten = torch.ops.aten


@functools.cache
def written_by(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operation overwrites."""
    places = enumerate(func._schema.arguments)
    return [(i, s.name) for i, s in places if s.alias_info is not None and s.alias_info.is_write]


@functools.cache
def output_mask(func: Any) -> int | None:
    """The place of the argument that says which results an operation computes."""
    arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else []
    return next((i for i, spec in enumerate(arguments) if spec.name == "output_mask"), None)


def is_dynamic(func: Any, args: Any) -> bool:
    """Whether the shapes of an operation's results depend on data."""
    if func is aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.dynamic_output_shape in func.tags
