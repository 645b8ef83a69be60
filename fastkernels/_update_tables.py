"""The tables of a list of tensors on the device, kept between steps: rows, chunks, gradients.

A row is a `Row` of csrc/include/fast/anchored.h and a chunk a `Chunk`, so Triton and CUDA C++ read
the same memory. Only the gradients' addresses change from step to step; they have a table of their
own.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkernels._plans import Plans
from fastkernels._signature import ALIGNMENT
from fastkernels._update import STATS, Batch, addresses, dtype_codes

# sizeof(Row) / 8, and the words of a Row that hold its step and, in the low half, its group.
WORDS, STEP, GROUP = 14, 10, 12
# Elements of a chunk, the work of one program. A multiple of every code block, and a divisor of
# 2^32: the rounding draws are keyed by the high half of an element's index.
CHUNK = 16384

# Plans a CUDA graph reads at every replay: they and their tables live as long as the process.
_captured: list[Any] = []


def keep_for_graphs(*what: Any) -> None:
    """Keep tables that a captured graph reads at every replay as long as the process."""
    _captured.extend(what)


def flag(t: Tensor | None, device: torch.device) -> Tensor | None:
    """A loss scale or found_inf as the kernels read it, float32, or float64 where it is; those of
    GradScaler need no copy."""
    if t is None:
        return None
    return t.to(device, t.dtype if t.dtype == torch.float64 else torch.float32).reshape(1)


@dataclass(frozen=True)
class Launch:
    """A run of chunks whose rows are of one kind."""

    kind: Any
    first: int
    count: int


@dataclass(eq=False)
class Plan:
    """What one list of tensors needs on its device.

    `partial` float64 `[4, chunks]`: the sums of each chunk; `control` float64 `[3]`: gradient norm,
    what gradients are multiplied by, and whether the step is skipped; `seed` int64 `[1]` and
    `max_norm` float64 `[1]`.
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
            return torch.tensor(addresses, dtype=torch.int64)
        if torch.cuda.is_current_stream_capturing():
            if self.spare is None:
                raise RuntimeError("run a step of this optimizer between two graph captures")
            table, host, self.spare = torch.empty_like(self.grads), self.spare, None
            host.copy_(torch.tensor(addresses, dtype=torch.int64))
            keep_for_graphs(self, host, table)
            return table.copy_(host, non_blocking=True)
        if self.spare is None:
            self.spare = torch.empty(self.grads.shape, dtype=torch.int64, pin_memory=True)
        if addresses != self.uploaded:
            # torch's allocator keeps pinned memory until copies from it are done.
            host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
            self.grads.copy_(host, non_blocking=True)
            self.uploaded = addresses
        return self.grads


def _row(batch: Batch, i: int, types: bytes) -> tuple[int, ...]:
    """A Row in words; the gradient's, and what is absent, is 0."""

    def at(tensors: Sequence[Tensor | None]) -> int:
        return addresses([tensors[i]])[0] if tensors else 0

    moments, scales = map(at, batch.moments), map(at, batch.moment_scales)
    two = (0, 0)
    (*tail,) = struct.unpack("=2q", struct.pack("=i6s6x", batch.groups[i], types))
    return (
        batch.params[i].data_ptr(), 0, *[*moments, *two][:2],
        at(batch.anchors), at(batch.curvature), *[*scales, *two][:2], at(batch.curvature_scales),
        at(batch.remainders), batch.steps[i].data_ptr(), batch.params[i].numel(), *tail,
    )  # fmt: skip


Kinds = Callable[[bytes, bool, bool], Hashable]


def _build(batch: Batch, kind_of: Kinds, seed: int, max_grad_norm: float | None) -> Plan:
    """Chunks are sorted into launches by their row's kind; ALIGNMENT is what 128-bit accesses
    need."""
    device = batch.params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{batch.op.name}: the tables of this list of tensors are not on the device yet; run "
            "one step before capturing a graph"
        )
    types = dtype_codes(batch)
    rows, by_kind = [], OrderedDict[Hashable, list[tuple[int, int]]]()
    for i, p in enumerate(batch.params):
        row = _row(batch, i, types[6 * i : 6 * i + 6])
        rows.append(row)
        read = (row[0], batch.grads[i].data_ptr(), *row[2:6], row[9])
        aligned = not any(address % ALIGNMENT for address in read)
        kind = kind_of(types[6 * i : 6 * i + 6], row[9] != 0, aligned)
        for begin in range(0, p.numel(), CHUNK):
            count = min(CHUNK, p.numel() - begin)
            by_kind.setdefault(kind, []).append((begin, i | count << 32))
    launches: list[Launch] = []
    chunks: list[tuple[int, int]] = []
    for kind, members in sorted(by_kind.items(), key=lambda item: item[0] == "double"):
        launches.append(Launch(kind, len(chunks), len(members)))
        chunks += members

    def table(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    return Plan(
        table(rows), table(chunks or [(0, 0)]), launches,
        grads=torch.zeros(len(rows), dtype=torch.int64, device=device),
        partial=torch.zeros(len(STATS), max(1, len(chunks)), dtype=torch.float64, device=device),
        control=torch.zeros(3, dtype=torch.float64, device=device),
        seed=table([seed]),
        max_norm=torch.tensor([max_grad_norm or 0.0], dtype=torch.float64).to(device),
    )  # fmt: skip


PLANS = Plans(_build)
