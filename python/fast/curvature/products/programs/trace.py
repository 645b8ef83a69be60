"""A trace: all operations of a computation, so that it can run again without its code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Ref(NamedTuple):
    """The place of a tensor among the arguments of a recorded operation."""

    value: int


@dataclass(kw_only=True)
class Value:
    """One tensor of the computation.

    Attributes:
        memory: the first value in the same memory: views of one tensor share it.
        layout: offset, shape and strides in this memory, and how its bits are read.
        constant: the tensor itself, where it is a number that the code wrote down.
        is_input: whether it is an input.
    """

    memory: int
    layout: tuple[Any, ...]
    constant: Tensor | None = None
    is_input: bool = False

    @property
    def is_made(self) -> bool:
        """Whether an operation of the computation gives it."""
        return not self.is_input and self.constant is None


@dataclass(kw_only=True)
class Node:
    """One operation: the values that it reads and makes, and the memory that it overwrites.

    Attributes:
        args, kwargs: as it was called, with a `Ref` in place of each tensor.
        reads: the values among its arguments.
        outputs: the values that it gives; None for an output that is no tensor.
        several: whether it gives a tuple.
        writes: the memory that it overwrites, by its first value.
        segment: the number of the segment that it belongs to.
        required: whether it has to run even if nothing depends on it, because it draws random
            numbers, or checks something.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    reads: list[int]
    outputs: list[int | None]
    several: bool = False
    writes: set[int] = field(default_factory=set)
    segment: int
    required: bool = False

    def made(self) -> list[int]:
        """The values that it gives."""
        return [o for o in self.outputs if o is not None]


@dataclass(kw_only=True)
class Trace:
    """What a computation did.

    Attributes:
        values: every tensor, by its number.
        nodes: every operation, in order.
        segments: the values that each part of the computation is given, and those that it results
            in.
    """

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    segments: list[tuple[list[int], list[int]]] = field(default_factory=list)


class BranchChanged(Exception):
    """A number that steers the network's code is no longer the one that was traced."""


def expect(func: Callable[..., Any], args: tuple[Any, ...], number: Any) -> None:
    """Read a number from data again, and raise `BranchChanged` if it is another one."""
    if func(*args) != number:
        raise BranchChanged
