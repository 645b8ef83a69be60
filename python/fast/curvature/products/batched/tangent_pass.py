"""Tangents are pushed through the operations of a tape, and each goes after its last use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fast.curvature.products.batched.tape import VIEWS, Operation, Slots, flat
from fast.curvature.products.rules import NO_FAULT, RuleError


class TangentPass:
    """Some operations of a tape, through which tangents are pushed in order.

    Args:
        operations: those of the pass, in order.
        sizes: bytes of one tangent, by slot.
        keep: slots whose tangents are needed afterwards.
    """

    def __init__(self, operations: list[Operation], sizes: list[int], keep: Iterable[int | None]):
        self.operations = operations
        self.sizes = sizes
        # The slots that are let go after each operation.
        self.free: list[list[int]] = [[] for _ in operations]
        keep_until_end = set(keep)
        last: dict[int, int] = {}
        for i, operation in enumerate(operations):
            for s in (*flat(operation.inputs), *flat(operation.outputs)):
                last[s] = i
        for s, i in last.items():
            if s not in keep_until_end:
                self.free[i].append(s)

    def reads(self) -> set[int]:
        """The slots that some operation reads."""
        return {s for operation in self.operations for s in flat(operation.inputs)}

    def peak(self, live: set[int]) -> int:
        """Largest number of bytes per vector of tangents that are alive together.

        Args:
            live: slots of the tangents that are there at the start.
        """
        now = most = sum(self.sizes[s] for s in live)
        for operation, free in zip(self.operations, self.free, strict=True):
            now += sum(self.sizes[s] for s in flat(operation.outputs))
            most = max(most, now)
            now -= sum(self.sizes[s] for s in free)
        return most

    def largest(self, apart: set[int | None]) -> int:
        """Largest number of bytes of a tangent that is made here, the slots `apart` left out."""
        results = {s for o in self.operations if o.name not in VIEWS for s in flat(o.outputs)}
        return max((self.sizes[s] for s in results - apart), default=0)

    def run(self, values: list[Tensor | None], into: dict[int, Tensor] | None = None) -> None:
        """Push the tangents in `values`, by slot, through all operations, and add their results.

        Args:
            into: slots whose tangents should be written to memory that is there already. This is
                done where the operation's derivative can.

        Raises:
            RuleError: a derivative failed; the message names the operation.
        """
        into = into or {}
        for operation, free in zip(self.operations, self.free, strict=True):
            inputs = (_tangents(values, s) for s in operation.inputs)
            first = operation.outputs[0]
            target = None if first is None else into.get(first)
            writes = target is not None and hasattr(operation.derivative, "writes_into")
            try:
                out = operation.derivative(*inputs, **({"into": target} if writes else {}))
            except NO_FAULT:
                raise
            except Exception as error:
                raise RuleError.of(operation.name, error) from error
            outs = out if isinstance(out, tuple | list) else (out,)
            for slot, o in zip(operation.outputs, outs, strict=True):
                if slot is not None:
                    values[slot] = o
            del out, outs
            for slot in free:
                values[slot] = None

    def sources(self, slots: Iterable[int | None]) -> dict[int, tuple[int, bool]]:
        """slot -> (the slot that it is a view of, whether transposed), through transposes alone."""
        writer = {s: operation for operation in self.operations for s in flat(operation.outputs)}
        sources = {}
        for slot in slots:
            if slot is None:
                continue
            source, is_transposed = slot, False
            while source in writer and writer[source].name == "aten.t.default":
                before = writer[source].inputs[0]
                assert isinstance(before, int)
                source, is_transposed = before, not is_transposed
            sources[slot] = (source, is_transposed)
        return sources


def _tangents(values: list[Tensor | None], slots: Slots) -> Any:
    """What a derivative gets for an argument with these slots."""
    if isinstance(slots, list):
        return [None if s is None else values[s] for s in slots]
    return None if slots is None else values[slots]
