"""Tables of lists of tensors, kept between steps and found again by their tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastkernels import _checks, _signature
from fastkernels._update import Batch

# Tensors in all plans that are kept, 0.3 KB each: stepping in the backward pass takes an optimizer,
# and a plan, per tensor.
MAX_TENSORS = 1 << 16

WriteBack = Callable[[], None]


class Entry(NamedTuple):
    """A plan, what it was made for, and the addresses of all tensors that it writes to."""

    signature: _signature.Signature
    plan: Any
    tensors: int
    written: frozenset[int]


class Plans:
    """The plans that `build` made, by the tensors they were made for. They hold no tensor."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._known: OrderedDict[tuple[Any, ...], Entry] = OrderedDict()
        self._tensors = 0

    def find(self, batch: Batch, *what: Any) -> tuple[Any, Batch, list[int], WriteBack]:
        """The plan of `batch`, by `build(batch, *what)` where it is not known; the batch to run,
        whose tensors all have their parameter's layout; its gradients' addresses; and what brings
        copies of mutated tensors back.

        Raises:
            ValueError: the tensors do not fit each other, or one has no memory of its own.
        """
        # Two optimizers may share parameters, and each step may have gradients for others of them.
        who = hash(tuple(map(id, batch.params)))
        first_step = id(batch.steps[0]) if batch.steps else 0
        key = (what, batch.params[0].device, len(batch.params), who, first_step)
        known = self._known.get(key)
        addresses = known.signature.match(batch) if known is not None else None
        if known is not None and addresses and not known.written.isdisjoint(addresses):
            addresses = None  # a gradient became the memory of a parameter or of its state
        write_back: WriteBack = _nothing
        if addresses is None:
            batch, write_back = _checks.prepare(batch)
            addresses = known.signature.match(batch) if known is not None else None
        if known is None or addresses is None:
            signature = _signature.new()
            addresses = signature.record(batch)
            if addresses is None:
                raise ValueError(
                    f"{batch.op.name}: a tensor has no memory of its own; call "
                    f"torch.ops.fastkernels.{batch.op.name} with wrapper subclasses"
                )
            written = frozenset(map(Tensor.data_ptr, _checks.written(batch)))
            known = Entry(signature, self._build(batch, *what), len(batch.params), written)
            self._keep(key, known)
        self._known.move_to_end(key)
        return known.plan, batch, addresses, write_back

    def _keep(self, key: tuple[Any, ...], entry: Entry) -> None:
        if key in self._known:
            self._tensors -= self._known.pop(key).tensors
        self._known[key] = entry
        self._tensors += entry.tensors
        while self._tensors > MAX_TENSORS and len(self._known) > 1:
            self._tensors -= self._known.popitem(last=False)[1].tensors


def _nothing() -> None:
    return None
