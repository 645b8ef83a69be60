"""Recorded operations, and how tangents run through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fast.curvature.products.rules import NO_FAULT, RuleError, UnsupportedOperation

# The derivative of one call maps tangents of the arguments (None where an argument has none, a list
# for an argument that is a list) to tangents of the outputs.
Derivative = Callable[..., Any]
Slots = int | None | list[int | None]
_VIEWS = ["t", "view", "_unsafe_view", "unsqueeze", "expand", "permute", "alias", "detach", "clone"]
# Steps whose results are those of another step, in another order.
VIEWS = {f"aten.{name}.default" for name in _VIEWS} | {"aten.transpose.int", "aten.select.int"}


@dataclass(kw_only=True)
class Step:
    """One recorded call: read the slots `inputs`, apply, write the slots `outputs`."""

    name: str
    derivative: Derivative
    inputs: tuple[Slots, ...]
    outputs: tuple[int | None, ...]


@dataclass(kw_only=True)
class Tape:
    """The steps of one pass.

    Attributes:
        steps: in the order of the pass.
        kept: tensors that derivatives read, with their version and the operation's name.
        sizes: bytes of one tangent, by slot.
    """

    steps: list[Step] = field(default_factory=list)
    kept: list[tuple[Tensor, int, str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def new_slot(self, tensor: Tensor) -> int:
        self.sizes.append(tensor.numel() * tensor.element_size())
        return len(self.sizes) - 1

    def new_sum(self) -> int:
        """A slot for one number per vector."""
        self.sizes.append(8)
        return len(self.sizes) - 1

    def verify(self) -> None:
        """Raise UnsupportedOperation where a value that a derivative reads was overwritten."""
        for tensor, version, name in self.kept:
            if tensor._version != version:
                raise UnsupportedOperation(f"{name}, an input of which is overwritten later on")
        self.kept.clear()


class Schedule:
    """Steps in the order in which they run; a tangent goes after its last use, unless in `keep`."""

    def __init__(self, steps: list[Step], sizes: list[int], keep: Iterable[int | None]):
        self.steps = steps
        self.sizes = sizes
        self.free: list[list[int]] = [[] for _ in steps]
        kept = set(keep)
        last: dict[int, int] = {}
        for i, step in enumerate(steps):
            for s in (*flat(step.inputs), *(s for s in step.outputs if s is not None)):
                last[s] = i
        for s, i in last.items():
            if s not in kept:
                self.free[i].append(s)

    def reads(self) -> set[int]:
        return {s for step in self.steps for s in flat(step.inputs)}

    def peak(self, live: set[int]) -> int:
        """Largest number of bytes per vector of tangents that are alive together.

        Args:
            live: slots of the tangents that are there at the start.
        """
        now = most = sum(self.sizes[s] for s in live)
        for step, free in zip(self.steps, self.free, strict=True):
            now += sum(self.sizes[s] for s in step.outputs if s is not None)
            most = max(most, now)
            now -= sum(self.sizes[s] for s in free)
        return most

    def largest(self, apart: set[int | None]) -> int:
        """Largest number of bytes that a step makes per vector, except for the slots `apart`."""
        made = {s for step in self.steps if step.name not in VIEWS for s in flat(step.outputs)}
        return max((self.sizes[s] for s in made - apart), default=0)

    def run(self, values: list[Tensor | None], into: dict[int, Tensor] | None = None) -> None:
        """Fill `values` (by slot); slots in `into` are written there if their step can do that."""
        into = into or {}
        for step, free in zip(self.steps, self.free, strict=True):
            inputs = (_gather(values, s) for s in step.inputs)
            target = into.get(step.outputs[0]) if step.outputs[0] is not None else None
            writes = target is not None and hasattr(step.derivative, "writes_into")
            try:
                out = step.derivative(*inputs, **({"into": target} if writes else {}))
            except NO_FAULT:
                raise
            except Exception as error:
                raise RuleError.of(step.name, error) from error
            outs = out if isinstance(out, tuple | list) else (out,)
            for slot, o in zip(step.outputs, outs, strict=True):
                if slot is not None:
                    values[slot] = o
            del out, outs
            for slot in free:
                values[slot] = None

    def sources(self, slots: Iterable[int | None]) -> dict[int, tuple[int, bool]]:
        """slot -> (slot that it is a view of, whether transposed), through recorded transposes."""
        writer = {s: step for step in self.steps for s in step.outputs if s is not None}
        sources = {}
        for slot in slots:
            if slot is None:
                continue
            source, transposed = slot, False
            while source in writer and writer[source].name == "aten.t.default":
                before = writer[source].inputs[0]
                assert isinstance(before, int)
                source, transposed = before, not transposed
            sources[slot] = (source, transposed)
        return sources


def flat(inputs: Iterable[Slots]) -> list[int]:
    """The slots that are there; or, of a derivative's arguments, the tangents."""
    out: list[int] = []
    for s in inputs:
        if isinstance(s, list):
            out += [x for x in s if x is not None]
        elif s is not None:
            out.append(s)
    return out


def _gather(values: list[Tensor | None], slots: Slots) -> Any:
    if isinstance(slots, list):
        return [None if s is None else values[s] for s in slots]
    return None if slots is None else values[slots]
