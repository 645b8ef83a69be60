"""The linearisation of one batch: a record of its gradient, through which tangents are pushed."""

from __future__ import annotations

import torch
from torch import Tensor

from fast.curvature.losses.loss import Loss
from fast.curvature.network.batches import Batch
from fast.curvature.network.evaluation import StopGradients
from fast.curvature.network.network import Network, laid_out
from fast.curvature.network.parameter_space import Blocks
from fast.curvature.products.batched.forms import SecondOrder
from fast.curvature.products.batched.passes import Passes, Segment, untraced
from fast.curvature.products.batched.recorder import Recorder
from fast.curvature.products.batched.tape import Schedule, Tape
from fast.curvature.products.looped import OutputCurvature, grad_or_none
from fast.curvature.products.precision import rounding
from fast.curvature.products.rules import UnsupportedOperation

# Default for the bytes of tangents that are held at a time on the CPU.
DEFAULT_BUDGET = 2**30
# On a CPU a pass is fastest when its largest tangent stays below the size from which malloc maps
# fresh, zeroed pages every time (32 MiB, less what is alive). Gradients per product, exact, one
# thread, for 1 / 2 / 4 vectors a pass: ResNet-20 2.11 / 2.25 / 3.40, ViT 2.02 / 2.04 / 2.24, MLP
# 1.77 / 1.65 / 1.65.
CPU_TANGENT = 8 * 2**20


class Folded(Passes):
    """What Hessian and GGN share: forward record, curvature at the output, backward record.

    The Hessian is the derivative of the whole gradient. For the GGN, everything that the backward
    pass reads from the forward pass is fixed: it is the same record, with the output's cotangent as
    the only variable.
    """

    exact: bool
    form_slot: int | None

    def __init__(
        self,
        network: Network,
        loss: Loss,
        batch: Batch,
        index: int,
        curvature: OutputCurvature,
        chunk: int | None = None,
        budget: int | None = None,
        gemm: str | None = None,
        segment: Segment = untraced,
    ):
        self.segment, self.gemm = segment, gemm
        forward, backward = Tape(), Tape()
        recorder = Recorder(forward, self.exact)
        with network.scope(index, differentiable_twice=False):
            leaves = network.leaves()
            params = network.selected(leaves)
            recorder.originals = {
                i: n for i, n in network.names_by_id().items() if n in network.names
            }
            self.param_slots = [recorder.activate(p) for p in params]
            stopped = StopGradients(lambda t: recorder.slots.pop(t, None))
            with segment(*leaves.values()) as returns, stopped, recorder:
                z = network.outputs(leaves, batch.inputs)
                returns(z)
            dim = loss.class_dim(z, batch.target, network.class_dim)
            with segment() as returns, recorder:
                z, y = laid_out(z, batch.target, dim)
                detached = z.detach()
                returns(detached)
            self.output_dim, self.output_shape = dim, z.shape
            self.output_slot = recorder.slot(z)
            if z.requires_grad != (self.output_slot is not None):
                raise UnsupportedOperation("the custom autograd function that makes the output")
            self.answers, self.weight = (detached, y), 0.0
            self.curvature = curvature(loss, detached, y)
            # Only the shape of a GGN's cotangent matters, and there may be no label to compute it.
            cotangent = torch.zeros_like(detached)
            if self.exact:
                cotangent = loss.gradient(detached, y)
            recorder.forward = False
            if self.exact:
                backward = forward
            else:
                recorder.slots.clear()
                recorder.tape = backward
            split = len(forward.steps)
            self.cotangent_slot = recorder.activate(cotangent)
            with segment(cotangent), recorder:
                grads = grad_or_none([z], params, [cotangent])
            self.grad_slots = [None if g is None else recorder.slot(g) for g in grads]
            recorder.cache.clear()
            del z, grads
        forward.verify()
        backward.verify()
        self.shapes = [p.shape for p in params]
        outputs = {s for s in self.grad_slots if s is not None}
        later = backward.steps[split if self.exact else 0 :]
        self.backward = Schedule(later, backward.sizes, outputs)
        kept = self.backward.reads() | outputs if self.exact else set()
        self.late = kept
        self.forward = Schedule(forward.steps[:split], forward.sizes, {self.output_slot} | kept)
        self.sources = self.backward.sources(outputs)
        self.chunk = chunk or self._chunk(network.space.device, budget)
        self._prepare_forms(forward, split, recorder.gradient_of)

    def _prepare_forms(self, tape: Tape, split: int, gradient_of: dict[int, int]) -> None:
        """Find out what is needed for v^T A v: no more than the way to the output, for a GGN."""
        self.to_form, self.form, self.form_slot = self.forward, Schedule([], [], []), None

    def _chunk(self, device: torch.device, budget: int | None) -> int:
        """Number of vectors per pass, from the bytes that the tangents of one vector take."""
        start = {s for s in self.param_slots if s is not None}
        held = self.forward.reads() & self.backward.reads() if self.exact else set()
        peak = max(self.forward.peak(start), self.backward.peak(held), 1)
        if device.type == "cuda":
            budget = budget or torch.cuda.mem_get_info(device)[0] // 4
            return max(1, budget // peak)
        budget = budget or DEFAULT_BUDGET
        # The vectors and the products are there already.
        apart = {*self.param_slots, *self.grad_slots, *(s for s, _ in self.sources.values())}
        largest = max(self.forward.largest(apart), self.backward.largest(apart), 1)
        return max(1, min(budget // peak, CPU_TANGENT // largest))

    def jvp(self, vectors: Blocks, forward: Schedule) -> tuple[Tensor, list[Tensor | None]]:
        """Tangents of the output, [K, *output], and those by slot that are still needed."""
        num_vectors = vectors[0].shape[0]
        values: list[Tensor | None] = [None] * len(forward.sizes)
        for slot, v in zip(self.param_slots, vectors, strict=True):
            values[slot] = v
        forward.run(values)
        if self.output_slot is None:
            zero = vectors[0].new_zeros((num_vectors, *self.output_shape))
            return zero, values
        u = values[self.output_slot]
        assert u is not None
        return u, values

    def _product(self, vectors: Blocks, out: Blocks) -> None:
        with self.segment(*vectors) as returns, rounding(self.gemm):
            u, values = self.jvp(vectors, self.forward)
            if self.output_slot is not None and self.output_slot not in self.late:
                values[self.output_slot] = None
            if not self.exact:
                values = [None] * len(self.backward.sizes)
            u = _unshared(u, [*vectors, *values])
            returns(u)
        moved = self.curvature.product(u)
        del u
        with self.segment(moved, *out), rounding(self.gemm):
            self._pull(moved, values, out)

    def _pull(self, moved: Tensor, values: list[Tensor | None], out: Blocks) -> None:
        """Write the tangents of the gradient to `out`, from that of the cotangent."""
        values[self.cotangent_slot] = moved
        into = {}
        for slot, o in zip(self.grad_slots, out, strict=True):
            if slot is not None and slot in self.sources and o.ndim == 3:
                source, transposed = self.sources[slot]
                if not transposed:
                    into[source] = o
        self.backward.run(values, into)
        for slot, o in zip(self.grad_slots, out, strict=True):
            value = None if slot is None else values[slot]
            if value is None:
                o.zero_()
            elif value.data_ptr() != o.data_ptr():
                o.copy_(value)

    def _quad(self, vectors: Blocks) -> Tensor:
        with self.segment(*vectors) as returns, rounding(self.gemm):
            u, values = self.jvp(vectors, self.to_form)
            self.form.run(values)
            term = None if self.form_slot is None else values[self.form_slot]
            terms = [] if term is None else [term]
            returns(u, *terms)
        return sum(terms, self.curvature.quad(u))


class FoldedHessian(Folded):
    """Exact Hessian of one batch: the derivative of the record of its gradient."""

    exact = True

    def _prepare_forms(self, tape: Tape, split: int, gradient_of: dict[int, int]) -> None:
        pairs = zip(self.grad_slots, self.param_slots, strict=True)
        parameters = [(g, p) for g, p in pairs if g is not None]
        order = SecondOrder(tape, split, gradient_of, parameters, self.cotangent_slot)
        self.form, self.form_slot = Schedule(order.steps, tape.sizes, {order.total}), order.total
        kept = {self.output_slot} | self.form.reads()
        self.to_form = Schedule(order.forward, tape.sizes, kept)


class FoldedGGN(Folded):
    """J^T S J of one batch: forward record, curvature at the output, transposed record."""

    exact = False


def _unshared(u: Tensor, others: list[Tensor | None]) -> Tensor:
    """u, which will be overwritten; a copy where one of the others shares its memory."""
    memory = u.untyped_storage().data_ptr()
    used = any(t is not None and t.untyped_storage().data_ptr() == memory for t in others)
    return u.clone() if used else u
