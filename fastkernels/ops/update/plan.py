"""Plans: the tables of a list of tensors that kernels read, kept from step to step.

A row of a table is a `Row` of csrc/include/fast/anchored.h; CPU, Triton and CUDA C++ read the same
rows. Only the gradients' addresses change from step to step. `device_plan` has the plan of a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkernels.ops.update.call import STATS, UpdateCall
from fastkernels.ops.update.checks import prepare
from fastkernels.ops.update.signature import Signature, addresses, new_signature

# The dtypes of storage by the numbers of csrc's Dtype; None: absent.
DTYPES = (None, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)
_CODE_OF = {dtype: code for code, dtype in enumerate(DTYPES)}
# The fields of a Row by words of 8 bytes. The word of the group, an int32, and the one after it
# also hold the dtypes of parameter, gradient, two moments, anchor and curvature, a byte each.
ROW = (
    "param", "grad", "moment[0]", "moment[1]", "anchor", "curvature", "scale[0]", "scale[1]",
    "curvature_scale", "remainder", "step", "numel", "group", "types",
)  # fmt: skip
# The most tensors in all kept plans, at 0.3 KB each. Stepping in the backward pass takes an
# optimizer per tensor, and so a plan per tensor.
MAX_TENSORS = 1 << 16

Finish = Callable[[], None]


def rows_of(call: UpdateCall) -> list[tuple[int, ...]]:
    """A Row of each tensor as words; the gradient's address, and what is absent, is 0."""
    absent: list[None] = [None] * len(call.params)
    moments, scales = ([*lists, absent][:2] for lists in (call.moments, call.moment_scales))
    streams = [call.params, call.grads, *moments, call.anchors, call.curvature]
    types = [
        bytes(0 if t is None or not t.numel() else _CODE_OF[t.dtype] for t in tensors)
        for tensors in zip(*(tensors or absent for tensors in streams), strict=True)
    ]
    groups = [
        group | int.from_bytes(four[:4], "little") << 32
        for group, four in zip(call.groups, types, strict=True)
    ]
    pointers = [
        call.params, absent, *moments, call.anchors, call.curvature, *scales,
        call.curvature_scales, call.remainders, call.steps,
    ]  # fmt: skip
    columns = (
        *(addresses(tensors or absent) for tensors in pointers), map(Tensor.numel, call.params),
        groups, [int.from_bytes(two[4:], "little") for two in types],
    )  # fmt: skip
    return list(zip(*columns, strict=True))


class Entry(NamedTuple):
    """A plan, the tensors it was made for, and the addresses of all tensors that it writes."""

    signature: Signature
    plan: Any
    tensors: int
    outputs: frozenset[int]


def _may_overlap(call: UpdateCall, grad_addresses: list[int], entry: Entry) -> bool:
    """Whether what is new in each call became the memory of a parameter or of its state, or `stats`
    that of `hyper`."""
    outputs, hyper = entry.outputs, call.hyper.data_ptr()
    if hyper in outputs or not outputs.isdisjoint(grad_addresses):
        return True
    if call.stats is None:
        return False
    stats = call.stats.data_ptr()
    return stats in outputs or hyper - 8 * len(STATS) < stats < hyper + call.hyper.nbytes


class Plans:
    """The plans that `build` made; they keep no tensor of a call alive."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._entries: OrderedDict[tuple[Any, ...], Entry] = OrderedDict()
        self._tensors = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, call: UpdateCall, *what: Any) -> tuple[Any, UpdateCall, list[int], Finish]:
        """The plan of `call`, made by `build(call, *what)` when there is none.

        Returns:
            the plan; the call to run, whose tensors all have their parameter's layout; its
            gradients' addresses; and a function to run after the update, which writes copies of
            mutated tensors back and tells autograd.

        Raises:
            ValueError: the tensors do not fit each other, or one has no memory of its own.
        """
        # Two optimizers may share parameters, and each step may have gradients for other ones.
        who = hash(tuple(map(id, call.params)))
        first_step = id(call.steps[0]) if call.steps else 0
        key = (what, call.params[0].device, len(call.params), who, first_step)
        entry = self._entries.get(key)
        grad_addresses = entry.signature.match(call) if entry is not None else None
        if entry is not None and grad_addresses and _may_overlap(call, grad_addresses, entry):
            grad_addresses = None  # `prepare` refuses what overlaps
        write_back: Finish | None = None
        if grad_addresses is None:
            call, write_back = prepare(call)
            grad_addresses = entry.signature.match(call) if entry is not None else None
        if entry is None or grad_addresses is None:
            signature = new_signature()
            grad_addresses = signature.record(call)
            if grad_addresses is None:
                raise ValueError(
                    f"{call.rule.name}: a tensor has no memory of its own; call "
                    f"torch.ops.fastkernels.{call.rule.name} with wrapper subclasses"
                )
            outputs = frozenset(map(Tensor.data_ptr, call.outputs()))
            entry = Entry(signature, self._build(call, *what), len(call.params), outputs)
        self._keep(key, entry)

        def finish() -> None:
            if write_back is not None:
                write_back()
            # Kernels write behind autograd's back: a graph that saved a parameter must notice.
            torch.autograd.graph.increment_version(call.params)

        return entry.plan, call, grad_addresses, finish

    def _keep(self, key: tuple[Any, ...], entry: Entry) -> None:
        """Keep `entry` the longest, and drop the entries that were not used for the longest time.

        Another thread may have dropped or replaced it since it was found.
        """
        with self._lock:
            if key in self._entries:
                self._tensors -= self._entries.pop(key).tensors
            self._entries[key] = entry
            self._tensors += entry.tensors
            while self._tensors > MAX_TENSORS and len(self._entries) > 1:
                self._tensors -= self._entries.popitem(last=False)[1].tensors
