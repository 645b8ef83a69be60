"""Leave out of a trace what nobody needs, and what is computed twice."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fast.curvature.products.programs.trace import Node, Ref, Trace
from fast.curvature.products.programs.traits import output_mask


def merged(trace: Trace, passes: Sequence[int]) -> dict[int, int]:
    """value -> the same value, where it is computed earlier as well.

    Earlier means in a segment before all passes, or in the same pass.

    Args:
        passes: the segments that passes start with, in their order.
    """
    # The caller may overwrite the results of a segment.
    overwritten = {trace.values[v].memory for _, results in trace.segments for v in results}
    overwritten |= {m for node in trace.nodes for m in node.writes}
    same: dict[int, int] = {}
    first: dict[Any, list[int | None]] = {}
    for node in trace.nodes:
        memories = {trace.values[v].memory for v in (*node.reads, *node.made())}
        if node.required or memories & overwritten:
            continue
        key = (node.func, _key(node.args, same), _key(node.kwargs, same))
        # Only what is kept is there when another pass runs.
        which = bisect.bisect(passes, node.segment)
        earlier = first.get((0, key)) or first.get((which, key))
        if earlier is None:
            first[which, key] = node.outputs
            continue
        for output, before in zip(node.outputs, earlier, strict=True):
            if output is not None and before is not None:
                same[output] = before
    return same


def live(trace: Trace, results: set[int], same: dict[int, int]) -> list[Node]:
    """The nodes that have to run for the values `results`, and for what is written to inputs."""
    live_values = set(results)
    memories = {trace.values[v].memory for v in live_values}
    memories |= {v.memory for v in trace.values if v.is_input or v.constant is not None}
    nodes: list[Node] = []
    for node in reversed(trace.nodes):
        new = [o for o in node.made() if same.get(o, o) == o]
        if not (node.required or node.writes & memories or live_values.intersection(new)):
            continue
        nodes.append(_masked(node, live_values))
        for v in node.reads:
            live_values.add(same.get(v, v))
            memories.add(trace.values[same.get(v, v)].memory)
    return nodes[::-1]


def _masked(node: Node, live_values: set[int]) -> Node:
    """The node, told to leave out results that nobody needs where the operation can do that."""
    place = output_mask(node.func)
    if place is None or place >= len(node.args):
        return node
    outputs = [o if o in live_values else None for o in node.outputs]
    mask = tuple(m and o is not None for m, o in zip(node.args[place], outputs, strict=True))
    args = (*node.args[:place], mask, *node.args[place + 1 :])
    return replace(node, args=args, outputs=outputs)


def _key(tree: Any, same: dict[int, int]) -> Any:
    """A key that is equal for equal arguments: 1, 1.0 and True are not."""
    if isinstance(tree, Ref):
        return Ref(same.get(tree.value, tree.value))
    if isinstance(tree, tuple | list):
        return tuple(_key(part, same) for part in tree)
    if isinstance(tree, dict):
        return tuple((k, _key(part, same)) for k, part in tree.items())
    return type(tree), repr(tree)
