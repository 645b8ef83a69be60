"""The tape holds the operations of one pass, each with its derivative, in the order of the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fast.curvature.products.rules import UnsupportedOperation

# The derivative of one call maps tangents of the arguments (None where an argument has none, a list
# for an argument that is a list) to tangents of the outputs.
Derivative = Callable[..., Any]
# A slot is the number of a tangent on a tape. An argument that is a list has a list of slots.
Slots = int | None | list[int | None]
_VIEWS = ["t", "view", "_unsafe_view", "unsqueeze", "expand", "permute", "alias", "detach", "clone"]
# Operations whose results hold the numbers of their argument, in another order.
VIEWS = {f"aten.{name}.default" for name in _VIEWS} | {"aten.transpose.int", "aten.select.int"}


@dataclass(kw_only=True)
class Operation:
    """One recorded call, whose derivative reads the slots `inputs` and writes the slots `outputs`.

    A slot is None where the argument, or the result, does not depend on the parameters.
    """

    name: str
    derivative: Derivative
    inputs: tuple[Slots, ...]
    outputs: tuple[int | None, ...]


@dataclass(kw_only=True)
class Tape:
    """The operations that were recorded in one pass.

    Attributes:
        operations: in the order of the pass.
        versions: tensors that derivatives read, with their version and the operation's name.
        sizes: bytes of one tangent, by slot.
    """

    operations: list[Operation] = field(default_factory=list)
    versions: list[tuple[Tensor, int, str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def new_slot(self, tensor: Tensor) -> int:
        """A slot for the tangents of `tensor`."""
        self.sizes.append(tensor.numel() * tensor.element_size())
        return len(self.sizes) - 1

    def new_sum(self) -> int:
        """A slot for one number per vector."""
        self.sizes.append(8)
        return len(self.sizes) - 1

    def verify(self) -> None:
        """Raise UnsupportedOperation where a value that a derivative reads was overwritten."""
        for tensor, version, name in self.versions:
            if tensor._version != version:
                raise UnsupportedOperation(f"{name}, an input of which is overwritten later on")
        self.versions.clear()


def flat(slots: Iterable[Slots]) -> list[int]:
    """All slots but those that are None; the tangents alike, where a derivative's are given."""
    out: list[int] = []
    for s in slots:
        if isinstance(s, list):
            out += [x for x in s if x is not None]
        elif s is not None:
            out.append(s)
    return out
