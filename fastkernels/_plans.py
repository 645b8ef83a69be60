"""Tables of lists of tensors, kept between steps and found again by their tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastkernels import _checks, _signature
from fastkernels._update import Batch

# Tensors in all plans that are kept, 0.3 KB each: stepping in the backward pass takes an optimizer,
# and a plan, per tensor.
MAX_TENSORS = 1 << 16

WriteBack = Callable[[], None]
Entry = tuple[_signature.Signature, Any, int]


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
        first_step = batch.steps[0].data_ptr() if batch.steps else 0
        key = (what, batch.params[0].device, len(batch.params), who, first_step)
        known = self._known.get(key)
        addresses = known[0].match(batch) if known is not None else None
        write_back: WriteBack = _nothing
        if addresses is None:
            batch, write_back = _checks.prepare(batch)
            addresses = known[0].match(batch) if known is not None else None
        if known is None or addresses is None:
            signature = _signature.new()
            addresses = signature.record(batch)
            if addresses is None:
                raise ValueError(
                    f"{batch.op.name}: a tensor has no memory of its own; call "
                    f"torch.ops.fastkernels.{batch.op.name} with wrapper subclasses"
                )
            known = (signature, self._build(batch, *what), len(batch.params))
            self._keep(key, known)
        self._known.move_to_end(key)
        return known[1], batch, addresses, write_back

    def _keep(self, key: tuple[Any, ...], entry: Entry) -> None:
        if key in self._known:
            self._tensors -= self._known.pop(key)[2]
        self._known[key] = entry
        self._tensors += entry[2]
        while self._tensors > MAX_TENSORS and len(self._known) > 1:
            self._tensors -= self._known.popitem(last=False)[1][2]


def _nothing() -> None:
    return None
