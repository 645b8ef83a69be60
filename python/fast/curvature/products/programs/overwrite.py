"""Let elementwise operations of passes write over an argument that nobody reads any longer.

A tangent is larger than the caches, and to write its product with a mask to memory of its own takes
1.7 times as long (4 vectors of 512 x 1024 numbers: 1.65 and 0.95 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fast.curvature.products.programs.trace import Node, Ref, Trace, Value

aten = torch.ops.aten
_IN_PLACE: dict[Any, Any] = {
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.neg.default: aten.neg_.default,
}


def overwriting(
    trace: Trace, nodes: Sequence[Node], first: Callable[[int], int], first_pass: int
) -> list[Node]:
    """The same nodes, of which some write over their first argument.

    Args:
        first: the value that stands for a value, as `simplify.merged` says.
        first_pass: the first segment of a pass. What was made before is read by all passes.
    """
    memory = [value.memory for value in trace.values]  # the first value in each value's memory
    made_in = {o: node.segment for node in nodes for o in node.made()}
    last_read = {memory[first(v)]: i for i, node in enumerate(nodes) for v in node.reads}
    # The caller reads the results, and may write over them.
    last_read |= {memory[first(v)]: len(nodes) for _, results in trace.segments for v in results}
    rewritten = []
    for i, node in enumerate(nodes):
        in_place = _IN_PLACE.get(node.func)
        if in_place is not None and isinstance(node.args[0], Ref):
            (output,) = node.made()
            target = first(node.args[0].value)
            home = memory[target]
            others = [memory[first(v)] for v in node.reads if v != node.args[0].value]
            if (
                made_in.get(home, -1) >= first_pass
                and last_read[home] == i
                and home not in others
                and _same_places(trace.values[target], trace.values[output])
            ):
                node = replace(node, func=in_place, writes={home})
                # The result, and its views, lie in this memory from here on.
                last_read[home] = last_read.get(output, i)
                memory = [home if m == output else m for m in memory]
        rewritten.append(node)
    return rewritten


def _same_places(a: Value, b: Value) -> bool:
    """Whether two values have one layout, in which no two numbers share a place."""
    if a.layout[1:] != b.layout[1:]:
        return False
    dense_stride = 1
    for stride, size in sorted(zip(a.layout[2], a.layout[1], strict=True)):
        if size != 1 and stride != dense_stride:
            return False
        dense_stride *= size
    return True
