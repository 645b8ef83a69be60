"""Products of one batch with K vectors at once: K tangents are pushed through its record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fast.curvature.network.parameter_space import Blocks
from fast.curvature.products.batch_loss import BatchLoss
from fast.curvature.products.batched.forms import SecondOrder
from fast.curvature.products.batched.gradient_record import record_gradient
from fast.curvature.products.batched.passes import Passes, Segment, untraced
from fast.curvature.products.batched.tangent_pass import TangentPass
from fast.curvature.products.precision import rounding

# Default for the bytes of tangents that are held at a time on the CPU.
DEFAULT_BUDGET = 2**30
# On a CPU a pass is fastest when its largest tangent stays below the size from which malloc maps
# fresh, zeroed pages every time (32 MiB, less what is alive). Gradients per product, exact, one
# thread, for 1 / 2 / 4 vectors a pass: ResNet-20 2.11 / 2.25 / 3.40, ViT 2.02 / 2.04 / 2.24, MLP
# 1.77 / 1.65 / 1.65.
CPU_TANGENT = 8 * 2**20


class Folded(Passes):
    """What Hessian and GGN share: the forward pass, the curvature at the output, the backward pass.

    The Hessian is the derivative of the whole gradient. For the GGN, everything that the backward
    pass reads from the forward pass is fixed: it is the same record, with the output's cotangent as
    the only variable.

    Args:
        chunk: vectors per pass; by default as many as are fast, and fit into the budget.
        budget: bytes of tangents; by default 1 GiB, on a GPU a quarter of what is free.
        gemm: the arithmetic of matrix products (`products.precision`).
        segment: surrounds the parts of the record, so that they can be traced.
    """

    exact: bool  # whether this is the Hessian, and not the GGN
    # The slot of v^T H v - u^T S u, with u = J v and S the curvature at the output; None if zero.
    form_slot: int | None

    def __init__(
        self,
        of: BatchLoss,
        chunk: int | None = None,
        budget: int | None = None,
        gemm: str | None = None,
        segment: Segment = untraced,
    ):
        self.gemm = gemm
        self._segment: Segment = untraced
        self.record = record = record_gradient(of, exact=self.exact, segment=segment)
        self.curvature, self.output_dim = record.curvature, record.output_dim
        self.answers, self.weight = record.answers, 0.0
        gradients = record.gradients
        self.backward = TangentPass(record.backward, record.backward_tape.sizes, gradients)
        # Tangents of the forward pass that are needed after the output's.
        self.late = self.backward.reads() | gradients if self.exact else set()
        keep = {record.output_slot} | self.late
        self.forward = TangentPass(record.forward, record.forward_tape.sizes, keep)
        self.sources = self.backward.sources(gradients)
        self.chunk = chunk or self._fast_chunk(of.network.space.device, budget)
        self._prepare_forms()

    @contextmanager
    def traced(self, segment: Segment) -> Iterator[None]:
        """Surround the parts of passes inside with `segment`, so that they can be traced."""
        self._segment = segment
        try:
            yield
        finally:
            self._segment = untraced

    def _prepare_forms(self) -> None:
        """Find out what v^T A v needs: for a GGN no more than the way to the output."""
        self.to_form, self.form, self.form_slot = self.forward, TangentPass([], [], []), None

    def _fast_chunk(self, device: torch.device, budget: int | None) -> int:
        """Number of vectors per pass, from the bytes that the tangents of one vector take."""
        live = self.forward.reads() & self.backward.reads() if self.exact else set()
        start = set(self.record.parameter_slots)
        peak = max(self.forward.peak(start), self.backward.peak(live), 1)
        if device.type == "cuda":
            budget = budget or torch.cuda.mem_get_info(device)[0] // 4
            return max(1, budget // peak)
        budget = budget or DEFAULT_BUDGET
        # The vectors and the products are there already.
        products = {s for s, _ in self.sources.values()}
        apart = {*self.record.parameter_slots, *self.record.gradient_slots, *products}
        largest = max(self.forward.largest(apart), self.backward.largest(apart), 1)
        return max(1, min(budget // peak, CPU_TANGENT // largest))

    def product_pass(self, vectors: Blocks, out: Blocks) -> None:
        with self._segment(*vectors) as returns, rounding(self.gemm):
            u, values = self._push(vectors, self.forward)
            if self.record.output_slot is not None and self.record.output_slot not in self.late:
                values[self.record.output_slot] = None
            if not self.exact:
                values = [None] * len(self.backward.sizes)
            u = _unshared(u, [*vectors, *values])
            returns(u)
        cotangents = self.curvature.product(u)
        del u
        with self._segment(cotangents, *out), rounding(self.gemm):
            self._pull(cotangents, values, out)

    def form_pass(self, vectors: Blocks) -> Tensor:
        with self._segment(*vectors) as returns, rounding(self.gemm):
            u, values = self._push(vectors, self.to_form)
            self.form.run(values)
            term = None if self.form_slot is None else values[self.form_slot]
            terms = [] if term is None else [term]
            returns(u, *terms)
        return sum(terms, self.curvature.quad(u))

    def _push(self, vectors: Blocks, forward: TangentPass) -> tuple[Tensor, list[Tensor | None]]:
        """Tangents of the output, [K, *output], and those by slot that are still needed."""
        values: list[Tensor | None] = [None] * len(forward.sizes)
        for slot, v in zip(self.record.parameter_slots, vectors, strict=True):
            values[slot] = v
        forward.run(values)
        if self.record.output_slot is None:
            shape = self.answers[0].shape
            return vectors[0].new_zeros((vectors[0].shape[0], *shape)), values
        u = values[self.record.output_slot]
        assert u is not None
        return u, values

    def _pull(self, cotangents: Tensor, values: list[Tensor | None], out: Blocks) -> None:
        """Write the tangents of the gradient to `out`, from that of the cotangent."""
        values[self.record.cotangent_slot] = cotangents
        into = {}
        for slot, o in zip(self.record.gradient_slots, out, strict=True):
            if slot is not None and slot in self.sources and o.ndim == 3:
                source, is_transposed = self.sources[slot]
                if not is_transposed:
                    into[source] = o
        self.backward.run(values, into)
        for slot, o in zip(self.record.gradient_slots, out, strict=True):
            value = None if slot is None else values[slot]
            if value is None:
                o.zero_()
            elif value.data_ptr() != o.data_ptr():
                o.copy_(value)


class FoldedHessian(Folded):
    """Exact Hessian of one batch: the derivative of the record of its gradient."""

    exact = True

    def _prepare_forms(self) -> None:
        order = SecondOrder(self.record)
        sizes = self.record.forward_tape.sizes
        self.form, self.form_slot = TangentPass(order.operations, sizes, {order.total}), order.total
        keep = {self.record.output_slot} | self.form.reads()
        self.to_form = TangentPass(self.record.forward, sizes, keep)


class FoldedGGN(Folded):
    """J^T S J of one batch: the forward pass, the curvature at the output, the transposed pass."""

    exact = False


def _unshared(u: Tensor, others: list[Tensor | None]) -> Tensor:
    """u, which will be overwritten; a copy where one of the others shares its memory."""
    memory = u.untyped_storage().data_ptr()
    is_shared = any(t is not None and t.untyped_storage().data_ptr() == memory for t in others)
    return u.clone() if is_shared else u
