"""Plans: the tables of a list of tensors that kernels read, kept from step to step.

A row of a table is a `Row` of csrc/include/fast/anchored.h, and a chunk a `Chunk`; CPU, Triton and
CUDA C++ read the same tables. Only the gradients' addresses change from step to step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkernels.ops.update.call import STATS, UpdateCall
from fastkernels.ops.update.checks import prepare
from fastkernels.ops.update.signature import ALIGNMENT, Signature, addresses, new_signature

# The dtypes of storage by the numbers of csrc's Dtype; None: absent.
DTYPES = (None, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)
_CODE_OF = {dtype: code for code, dtype in enumerate(DTYPES)}
# The fields of a Row by words of 8 bytes. The word of the group, an int32, and the one after it
# also hold the dtypes of parameter, gradient, two moments, anchor and curvature, a byte each.
ROW = (
    "param", "grad", "moment[0]", "moment[1]", "anchor", "curvature", "scale[0]", "scale[1]",
    "curvature_scale", "remainder", "step", "numel", "group", "types",
)  # fmt: skip
# Elements of a chunk, the work of one program on a GPU. A multiple of every code block, and a
# divisor of 2^32: the rounding draws are keyed by the high half of an element's index.
CHUNK = 16384
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
        if entry is not None and grad_addresses and not entry.outputs.isdisjoint(grad_addresses):
            grad_addresses = None  # a gradient became the memory of a parameter or of its state
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


# The plan of a GPU, or of Triton's interpreter.

# Tables that CUDA graphs read at every replay: they have to live as long as the process.
_graph_tables: list[Any] = []


def keep_for_graphs(*what: Any) -> None:
    """Keep tables alive that a captured graph reads at every replay."""
    _graph_tables.extend(what)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run of chunks whose rows are of one kind."""

    kind: Any
    first: int
    count: int


@dataclass(eq=False, kw_only=True)
class DevicePlan:
    """The tables of a list of N tensors on its device, and scratch memory.

    Attributes:
        rows: int64 `[N, 14]`.
        chunks: int64 `[chunks, 2]`.
        grads: int64 `[N]`, the gradients' addresses.
        partial: float64 `[4, chunks]`, the sums of each chunk.
        control: float64 `[3]`: gradient norm, what gradients are multiplied by, and whether the
            step is skipped.
        seed: int64 `[1]`.
        max_norm: float64 `[1]`.
        contents: the addresses that `grads` holds, as far as the host knows.
        spare: pinned int64 `[N]`, the host's copy of the addresses in the next capture.
        in_graph: whether a captured graph may have written `grads` since.
    """

    rows: Tensor
    chunks: Tensor
    launches: list[Launch]
    grads: Tensor
    partial: Tensor
    control: Tensor
    seed: Tensor
    max_norm: Tensor
    contents: list[int] = field(default_factory=list)
    spare: Tensor | None = None
    in_graph: bool = False

    def upload(self, addresses: list[int]) -> Tensor:
        """The table of these gradients' addresses, without a sync.

        In a capture the copy becomes a node of the graph, which reads the pinned source again at
        every replay. So the graph gets a source and a table of its own, which stay alive.

        Raises:
            RuntimeError: a second capture without a step in between.
        """
        if not self.grads.is_cuda:
            return torch.tensor(addresses, dtype=torch.int64, device="cpu")
        if torch.cuda.is_current_stream_capturing():
            if self.spare is None:
                raise RuntimeError("run a step of this optimizer between two graph captures")
            table, host, self.spare = torch.empty_like(self.grads), self.spare, None
            host.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
            keep_for_graphs(self, host, table)
            return table.copy_(host, non_blocking=True)
        if self.spare is None:
            shape = self.grads.shape
            self.spare = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
        if addresses != self.contents:
            # torch's allocator keeps pinned memory until copies from it are done.
            host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=True)
            self.grads.copy_(host, non_blocking=True)
            self.contents = addresses
        return self.grads


# (dtypes of a row, whether it has a remainder, whether all its streams are aligned) -> kind.
# The dtypes are numbers: parameter, gradient, two moments, anchor, curvature.
KindOf = Callable[[bytes, bool, bool], Hashable]


def _build(call: UpdateCall, kind_of: KindOf, seed: int, max_grad_norm: float | None) -> DevicePlan:
    """Chunks are sorted into launches by the kind of their row."""
    device = call.params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{call.rule.name}: the tables of this list of tensors are not on the device yet; run "
            "one step before capturing a graph"
        )
    rows = rows_of(call)
    by_kind = OrderedDict[Hashable, list[tuple[int, int]]]()
    streams = [ROW.index(x) for x in ("param", "moment[0]", "moment[1]", "anchor", "curvature")]
    group, remainder = ROW.index("group"), ROW.index("remainder")
    for i, (row, grad) in enumerate(zip(rows, addresses(call.grads), strict=True)):
        read = (grad, row[remainder], *(row[k] for k in streams))
        is_aligned = not any(address % ALIGNMENT for address in read)
        types = (row[group] >> 32).to_bytes(4, "little") + row[group + 1].to_bytes(2, "little")
        members = by_kind.setdefault(kind_of(types, row[remainder] != 0, is_aligned), [])
        numel = row[ROW.index("numel")]
        for begin in range(0, numel, CHUNK):
            members.append((begin, i | min(CHUNK, numel - begin) << 32))
    launches: list[Launch] = []
    chunks: list[tuple[int, int]] = []
    for kind, members in by_kind.items():
        if members:
            launches.append(Launch(kind=kind, first=len(chunks), count=len(members)))
        chunks += members

    def table(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu").to(device)

    return DevicePlan(
        rows=table(rows), chunks=table(chunks or [(0, 0)]), launches=launches,
        grads=torch.zeros(len(rows), dtype=torch.int64, device=device),
        partial=torch.zeros(len(STATS), max(1, len(chunks)), dtype=torch.float64, device=device),
        control=torch.zeros(3, dtype=torch.float64, device=device),
        seed=table([seed]),
        max_norm=torch.tensor([max_grad_norm or 0.0], dtype=torch.float64, device=device),
    )  # fmt: skip


DEVICE_PLANS = Plans(_build)


def flag(t: Tensor | None, device: torch.device) -> Tensor | None:
    """A loss scale or found_inf as the kernels read it: float32 `[1]`, or float64 if it is float64.

    GradScaler's tensors need no copy.
    """
    if t is None:
        return None
    return t.to(device, t.dtype if t.dtype == torch.float64 else torch.float32).reshape(1)
