"""Tables of lists of tensors, kept between steps and found again by their tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastkernels import _checks, _signature
from fastkernels._update import Batch

# Stepping in the backward pass takes an optimizer, and a plan, per tensor.
MAX_PLANS = 4096

WriteBack = Callable[[], None]


class Plans:
    """The plans that `build` made, by the tensors they were made for. They hold no tensor."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._known: OrderedDict[tuple[Any, ...], tuple[_signature.Signature, Any]] = OrderedDict()

    def find(self, batch: Batch, *what: Any) -> tuple[Any, Batch, list[int], WriteBack]:
        """The plan of `batch`, by `build(batch, *what)` where it is not known; the batch to run,
        whose tensors all have their parameter's layout; its gradients' addresses; and what brings
        copies of mutated tensors back.

        Raises:
            ValueError: the tensors do not fit each other.
        """
        first = batch.params[0]
        # Two optimizers may share parameters, and a list may be stalled in part.
        key = (what, first.device, first.data_ptr(), batch.steps[0].data_ptr(), len(batch.params))
        signature, plan = self._known.get(key, (None, None))
        addresses = signature.match(batch) if signature is not None else None
        write_back: WriteBack = _nothing
        if addresses is None:
            batch, write_back = _checks.prepare(batch)
            addresses = signature.match(batch) if signature is not None else None
        if addresses is None:
            signature = _signature.new()
            addresses = signature.record(batch)
            assert addresses is not None, "prepared tensors have their parameters' layouts"
            plan = self._build(batch, *what)
            self._known[key] = signature, plan
            while len(self._known) > MAX_PLANS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return plan, batch, addresses, write_back


def _nothing() -> None:
    return None
