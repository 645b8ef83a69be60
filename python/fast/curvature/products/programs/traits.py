"""What an operation of torch does besides computing numbers, by its schema and its tags."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


class Traits(NamedTuple):
    """What an operation does besides computing.

    Attributes:
        dynamic: the shape of its results may depend on data.
        reads_data: it gives a number that it reads from data.
        random: it draws random numbers.
        writes: place and name of the arguments that it overwrites.
    """

    dynamic: bool
    reads_data: bool
    random: bool
    writes: list[tuple[int, str]]


@functools.cache
def traits_of(func: Any) -> Traits:
    """The traits of an operation."""
    places = enumerate(func._schema.arguments)
    targets = [(i, s) for i, s in places if s.alias_info is not None and s.alias_info.is_write]
    return Traits(
        dynamic=torch.Tag.dynamic_output_shape in func.tags,
        reads_data=torch.Tag.data_dependent_output in func.tags,
        random=torch.Tag.nondeterministic_seeded in func.tags,
        writes=[(i, spec.name) for i, spec in targets],
    )


@functools.cache
def output_mask(func: Any) -> int | None:
    """The place of the argument that says which results an operation computes."""
    arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else []
    return next((i for i, spec in enumerate(arguments) if spec.name == "output_mask"), None)


def is_static(func: Any, args: Any) -> bool:
    """Whether an operation that may give results of any shape does not, with these arguments."""
    if func is not aten.index.Tensor:
        return False
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])
