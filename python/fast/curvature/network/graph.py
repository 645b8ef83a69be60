"""Walks through the graph that autograd keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """Every node in the graph of `tensors`, once."""
    stack = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    visited = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                stack.append(following)


def graph_leaves(tensors: Iterable[Tensor | None]) -> Iterator[Tensor]:
    """The leaves that `tensors` depend on."""
    for node in nodes(tensors):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf


class SecondDerivativeError(RuntimeError):
    """A part of the network cannot be differentiated twice; the message names it."""


def cut_off(tensors: list[Tensor | None]) -> bool:
    """Whether a once-differentiable function is in the graph of `tensors`.

    torch raises an error for such a function only where a path through it leads on to the inputs.
    Where the path ends there, autograd.grad leaves the term out in silence.
    """
    return any(node.name() == "torch::autograd::Error" for node in nodes(tensors))
