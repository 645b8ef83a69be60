"""The plan of a GPU, or of Triton's interpreter: tables on its device, and chunks sorted by kind.

A chunk is a `Chunk` of csrc/include/fast/anchored.h.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkernels.ops.update.call import STATS, UpdateCall
from fastkernels.ops.update.plan import ROW, Plans, rows_of
from fastkernels.ops.update.signature import ALIGNMENT, addresses

# Elements of a chunk, the work of one program on a GPU. A multiple of every code block, and a
# divisor of 2^32: the rounding draws are keyed by the high half of an element's index.
CHUNK = 16384

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
