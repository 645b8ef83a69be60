"""Walking the graph that autograd keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """Every node in the graph of `tensors`, once."""
    stack = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def graph_leaves(tensors: Iterable[Tensor | None]) -> Iterator[Tensor]:
    """The leaves that `tensors` depend on."""
    for node in nodes(tensors):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
