"""What is kept of a list of tensors between steps: tables for the kernels, found by their tensors.

A row is a `Row` of csrc/include/fast/anchored.h and a chunk a `Chunk`; CPU, Triton and CUDA C++
read the same ones. Only the gradients' addresses change from step to step.

A plan is used again while its tensors are the same ones: addresses, dtypes, devices and layouts
are compared at every step, for gradients all but the address. Tensors may get new storage behind
our back (`.data =`, `share_memory_()`), so identity is not enough, and addresses alone are not
either: memory is given to other tensors.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastkernels.backends import native
from fastkernels.ops.update.batch import STATS, Batch
from fastkernels.ops.update.checks import prepare, same_layout

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
# Bytes that accesses of 128 bits need addresses to be a multiple of.
ALIGNMENT = 16
# Tensors in all plans that are kept, 0.3 KB each: stepping in the backward pass takes an optimizer,
# and a plan, per tensor.
MAX_TENSORS = 1 << 16

Finish = Callable[[], None]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The address of each tensor, 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    """A Row of each tensor as words; the gradient's address, and what is absent, is 0."""
    zeros = [0] * len(batch.params)
    none: list[None] = [None] * len(batch.params)

    def column(tensors: Sequence[Tensor | None]) -> list[int]:
        return addresses(tensors) if tensors else zeros

    stored = (
        batch.params, batch.grads, *[*batch.moments, none][:2], batch.anchors or none,
        batch.curvature or none,
    )  # fmt: skip
    types = [
        bytes(0 if t is None or not t.numel() else _CODE_OF[t.dtype] for t in tensors)
        for tensors in zip(*stored, strict=True)
    ]
    groups = [
        group | int.from_bytes(four[:4], "little") << 32
        for group, four in zip(batch.groups, types, strict=True)
    ]
    columns = (
        column(batch.params), zeros, *[*map(column, batch.moments), zeros][:2],
        column(batch.anchors), column(batch.curvature),
        *[*map(column, batch.moment_scales), zeros, zeros][:2], column(batch.curvature_scales),
        column(batch.remainders), column(batch.steps), map(Tensor.numel, batch.params),
        groups, [int.from_bytes(two[4:], "little") for two in types],
    )  # fmt: skip
    return list(zip(*columns, strict=True))


# Whether the tensors of a call are still those of a plan.


class Signature(Protocol):
    """`record` remembers a batch whose tensors have their parameter's layout; `match` tells whether
    another one is the same. Both return the gradients' addresses, or None: no."""

    def record(self, batch: Batch) -> list[int] | None: ...

    def match(self, batch: Batch) -> list[int] | None: ...


class NativeSignature:
    """Compares in csrc/tensors.h: 2.2 ms for 14 000 tensors out of cache; torch's took 3.7."""

    def __init__(self) -> None:
        table = Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
        self._native = native.module().Signature(table)
        self._groups: Sequence[int] = ()

    def record(self, batch: Batch) -> list[int] | None:
        self._groups = list(batch.groups)
        moving: list[int] | None = self._native.record(*_lists(batch))
        return moving

    def match(self, batch: Batch) -> list[int] | None:
        if self._groups != batch.groups:
            return None
        moving: list[int] | None = self._native.match(*_lists(batch))
        return moving


def _lists(batch: Batch) -> tuple[list[Any], list[Any], list[list[Any]], list[list[Any]]]:
    shaped = [*batch.moments, batch.anchors, batch.curvature, batch.remainders]
    others = [batch.steps, *batch.moment_scales, batch.curvature_scales]
    return list(batch.params), list(batch.grads), [*map(list, shaped)], [*map(list, others)]


class TorchSignature:
    """Without a compiled module, or a torch older than the exchange table (2.10)."""

    def __init__(self) -> None:
        self._layout: list[Any] = []

    def record(self, batch: Batch) -> list[int] | None:
        if not _grads_fit(batch):
            return None
        self._layout = _layout_of(batch)
        return addresses(batch.grads)

    def match(self, batch: Batch) -> list[int] | None:
        with contextlib.suppress(AttributeError):  # of an entry that is no tensor
            if _grads_fit(batch) and self._layout == _layout_of(batch):
                return addresses(batch.grads)
        return None


def _layout_of(batch: Batch) -> list[Any]:
    """What `match` compares. No tuple per tensor: they make garbage collection slow."""
    params, _, shaped, others = _lists(batch)
    lists = [params, *shaped, *others]
    return [
        list(batch.groups),
        [g.data_ptr() % ALIGNMENT for g in batch.grads],
        [g.dtype for g in batch.grads],
        [addresses(tensors) for tensors in lists],
        [[None if t is None else t.dtype for t in tensors] for tensors in lists],
        [[None if t is None else t.shape for t in tensors] for tensors in lists],
        [[t.stride() for t in tensors if t is not None and not t.is_contiguous()]
         for tensors in lists],
    ]  # fmt: skip


def _grads_fit(batch: Batch) -> bool:
    """Whether the gradients can be read in the parameters' order."""
    return len(batch.params) == len(batch.grads) and all(
        g.device == p.device
        and g.layout == torch.strided
        and p.shape == g.shape
        and same_layout(p, g)
        for p, g in zip(batch.params, batch.grads, strict=True)
    )


def new_signature() -> Signature:
    """The faster one that works here."""
    if native.available()[0] and hasattr(Tensor, "__dlpack_c_exchange_api__"):
        with contextlib.suppress(ValueError):  # a table of another version
            return NativeSignature()
    return TorchSignature()


# Plans, by the tensors they were made for.


class Entry(NamedTuple):
    """A plan, what it was made for, and the addresses of all tensors that it writes to."""

    signature: Signature
    plan: Any
    tensors: int
    written: frozenset[int]


class Plans:
    """The plans that `build` made. They hold no tensor of a batch."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._entries: OrderedDict[tuple[Any, ...], Entry] = OrderedDict()
        self._tensors = 0

    def find(self, batch: Batch, *what: Any) -> tuple[Any, Batch, list[int], Finish]:
        """The plan of `batch`, made by `build(batch, *what)` when there is none.

        Returns:
            the plan; the batch to run, whose tensors all have their parameter's layout; its
            gradients' addresses; and what to call after the update: it brings copies of mutated
            tensors back, and tells autograd.

        Raises:
            ValueError: the tensors do not fit each other, or one has no memory of its own.
        """
        # Two optimizers may share parameters, and each step may have gradients for others of them.
        who = hash(tuple(map(id, batch.params)))
        first_step = id(batch.steps[0]) if batch.steps else 0
        key = (what, batch.params[0].device, len(batch.params), who, first_step)
        entry = self._entries.get(key)
        moving = entry.signature.match(batch) if entry is not None else None
        if entry is not None and moving and not entry.written.isdisjoint(moving):
            moving = None  # a gradient became the memory of a parameter or of its state
        write_back: Finish | None = None
        if moving is None:
            batch, write_back = prepare(batch)
            moving = entry.signature.match(batch) if entry is not None else None
        if entry is None or moving is None:
            signature = new_signature()
            moving = signature.record(batch)
            if moving is None:
                raise ValueError(
                    f"{batch.rule.name}: a tensor has no memory of its own; call "
                    f"torch.ops.fastkernels.{batch.rule.name} with wrapper subclasses"
                )
            written = frozenset(map(Tensor.data_ptr, batch.written()))
            entry = Entry(signature, self._build(batch, *what), len(batch.params), written)
            self._keep(key, entry)
        self._entries.move_to_end(key)

        def finish() -> None:
            if write_back is not None:
                write_back()
            # Kernels write behind autograd's back: a graph that saved a parameter must notice.
            torch.autograd.graph.increment_version(batch.params)

        return entry.plan, batch, moving, finish

    def _keep(self, key: tuple[Any, ...], entry: Entry) -> None:
        if key in self._entries:
            self._tensors -= self._entries.pop(key).tensors
        self._entries[key] = entry
        self._tensors += entry.tensors
        while self._tensors > MAX_TENSORS and len(self._entries) > 1:
            self._tensors -= self._entries.popitem(last=False)[1].tensors


# The plan of a GPU, or of Triton's interpreter.

# What a CUDA graph reads at every replay: it lives as long as the process.
_captured: list[Any] = []


def keep_for_graphs(*what: Any) -> None:
    """Keep tables that a captured graph reads at every replay as long as the process."""
    _captured.extend(what)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run of chunks whose rows are of one kind."""

    kind: Any
    first: int
    count: int


@dataclass(eq=False, kw_only=True)
class DevicePlan:
    """The tables of a list of N tensors on its device, and scratch memory.

    Args:
        rows: int64 `[N, 14]`.
        chunks: int64 `[chunks, 2]`.
        grads: int64 `[N]`, the gradients' addresses.
        partial: float64 `[4, chunks]`, the sums of each chunk.
        control: float64 `[3]`: gradient norm, what gradients are multiplied by, and whether the
            step is skipped.
        seed: int64 `[1]`.
        max_norm: float64 `[1]`.
    """

    rows: Tensor
    chunks: Tensor
    launches: list[Launch]
    grads: Tensor
    partial: Tensor
    control: Tensor
    seed: Tensor
    max_norm: Tensor
    uploaded: list[int] = field(default_factory=list)
    spare: Tensor | None = None
    replayed: bool = False

    def upload(self, addresses: list[int]) -> Tensor:
        """The table of these gradients' addresses, without a sync.

        In a capture the copy becomes a node of the graph, which reads its pinned source again at
        every replay: source and table are the graph's own, and stay.

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
        if addresses != self.uploaded:
            # torch's allocator keeps pinned memory until copies from it are done.
            host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=True)
            self.grads.copy_(host, non_blocking=True)
            self.uploaded = addresses
        return self.grads


# (dtypes of a row, whether it has a remainder, whether all its streams are aligned) -> kind.
# The dtypes are numbers: parameter, gradient, two moments, anchor, curvature.
KindOf = Callable[[bytes, bool, bool], Hashable]


def _build(batch: Batch, kind_of: KindOf, seed: int, max_grad_norm: float | None) -> DevicePlan:
    """Chunks are sorted into launches by the kind of their row."""
    device = batch.params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{batch.rule.name}: the tables of this list of tensors are not on the device yet; run "
            "one step before capturing a graph"
        )
    rows = rows_of(batch)
    by_kind = OrderedDict[Hashable, list[tuple[int, int]]]()
    streams = [ROW.index(x) for x in ("param", "moment[0]", "moment[1]", "anchor", "curvature")]
    group, remainder = ROW.index("group"), ROW.index("remainder")
    for i, (row, grad) in enumerate(zip(rows, addresses(batch.grads), strict=True)):
        read = (grad, row[remainder], *(row[k] for k in streams))
        aligned = not any(address % ALIGNMENT for address in read)
        types = (row[group] >> 32).to_bytes(4, "little") + row[group + 1].to_bytes(2, "little")
        members = by_kind.setdefault(kind_of(types, row[remainder] != 0, aligned), [])
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
    """A loss scale or found_inf as the kernels read it: float32 `[1]`, or float64 where it is.
    Those of GradScaler need no copy."""
    if t is None:
        return None
    return t.to(device, t.dtype if t.dtype == torch.float64 else torch.float32).reshape(1)
