"""Leave out of a trace what nothing depends on, and what is computed twice."""

from __future__ import annotations

from typing import Any

from fast.curvature.products.programs.tracer import Node, Ref, Trace


def merged(trace: Trace, num_kept: int) -> dict[int, int]:
    """value -> the same value, computed earlier: in a segment that is kept, or in the same pass."""
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
        # Each pass has two segments, and only what is kept is there when another one runs.
        which = max(-1, (node.segment - num_kept) // 2)
        earlier = first.get((-1, key)) or first.get((which, key))
        if earlier is None:
            first[which, key] = node.outputs
            continue
        for output, before in zip(node.outputs, earlier, strict=True):
            if output is not None and before is not None:
                same[output] = before
    return same


def live(trace: Trace, wanted: set[int], same: dict[int, int]) -> list[Node]:
    """The nodes that have to run for the values `wanted`, and for what is written to inputs."""
    needed = set(wanted)
    memories = {trace.values[v].memory for v in needed}
    memories |= {v.memory for v in trace.values if v.given or v.constant is not None}
    kept: list[Node] = []
    for node in reversed(trace.nodes):
        made = [o for o in node.made() if same.get(o, o) == o]
        if not (node.required or node.writes & memories or needed.intersection(made)):
            continue
        kept.append(node)
        for v in node.reads:
            needed.add(same.get(v, v))
            memories.add(trace.values[same.get(v, v)].memory)
    return kept[::-1]


def _key(tree: Any, same: dict[int, int]) -> Any:
    """A key that is equal for equal arguments: 1, 1.0 and True are not."""
    if isinstance(tree, Ref):
        return Ref(same.get(tree.value, tree.value))
    if isinstance(tree, tuple | list):
        return tuple(_key(part, same) for part in tree)
    if isinstance(tree, dict):
        return tuple((k, _key(part, same)) for k, part in tree.items())
    return type(tree), repr(tree)
