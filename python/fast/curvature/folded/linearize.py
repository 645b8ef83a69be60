"""One batch, linearised: the record of its gradient, and products by pushing tangents through it."""

from __future__ import annotations

import torch
from torch import Tensor

from fast.curvature.data import Batch
from fast.curvature.folded.recorder import Recorder, Slots, Tape
from fast.curvature.folded.rules import UnsupportedOperation
from fast.curvature.loop import OutputCurvature, grad_or_none
from fast.curvature.losses import Loss
from fast.curvature.network import Network, stop_gradients
from fast.curvature.space import Blocks, dot


class _Folded:
    """What Hessian and GGN share: forward record, curvature at the output, backward record.

    The Hessian is the derivative of the whole gradient. The GGN holds everything that the backward
    pass reads from the forward pass fixed: the same record, with the output's cotangent as its only
    variable.
    """

    exact: bool

    def __init__(
        self, network: Network, loss: Loss, batch: Batch, index: int, curvature: OutputCurvature
    ):
        forward, backward = Tape(), Tape()
        recorder = Recorder(forward)
        with network.scope(index, differentiable_twice=False):
            leaves = network.leaves()
            params = network.selected(leaves)
            self.param_slots = [recorder.activate(p) for p in params]
            with stop_gradients(lambda t: recorder.slots.pop(t, None)), recorder:
                z = network.outputs(leaves, batch.inputs)
            self.output_shape = z.shape
            self.output_slot = recorder.slot(z)
            if z.requires_grad != (self.output_slot is not None):
                raise UnsupportedOperation("the custom autograd function that makes the output")
            detached = z.detach()
            self.weight = loss.weight(detached, batch.target, batch.size)
            self.curvature = curvature(detached, batch)
            cotangent = loss.gradient(detached, batch.target)
            recorder.forward = False
            if self.exact:
                backward = forward
            else:
                recorder.slots.clear()
                recorder.tape = backward
            self.split = len(forward.steps)
            self.cotangent_slot = recorder.activate(cotangent)
            with recorder:
                grads = grad_or_none([z], params, [cotangent])
            self.grad_slots = [None if g is None else recorder.slot(g) for g in grads]
            del z, grads
        forward.verify()
        backward.verify()
        self.forward = _Program(forward.steps[: self.split], forward.num_slots)
        self.backward = _Program(
            backward.steps[self.split if self.exact else 0 :], backward.num_slots
        )
        self.shapes = [p.shape for p in params]
        self._plan()

    def _plan(self) -> None:
        """When each tangent is needed for the last time."""
        outputs = {s for s in self.grad_slots if s is not None}
        if self.exact:
            later = self.backward.reads() | outputs
            self.forward.free_after_use(later | {self.output_slot})
        else:
            self.forward.free_after_use({self.output_slot})
        self.backward.free_after_use(outputs)

    def jvp(self, vectors: Blocks) -> tuple[Tensor, list[Tensor | None]]:
        """Tangents of the output, [K, *output], and of everything that is still needed."""
        num_vectors = vectors[0].shape[0]
        values: list[Tensor | None] = [None] * self.forward.num_slots
        for slot, v in zip(self.param_slots, vectors, strict=True):
            values[slot] = v
        self.forward.run(values)
        if self.output_slot is None:
            zero = vectors[0].new_zeros((num_vectors, *self.output_shape))
            return zero, values
        u = values[self.output_slot]
        assert u is not None
        return u, values

    @torch.no_grad()
    def products(self, vectors: Blocks) -> Blocks:
        u, values = self.jvp(vectors)
        if not self.exact:
            values = [None] * self.backward.num_slots
        values[self.cotangent_slot] = self.curvature(u)
        del u
        self.backward.run(values)
        num_vectors = vectors[0].shape[0]
        return [
            v.new_zeros((num_vectors, *shape)) if slot is None else _owned(values[slot])
            for slot, shape, v in zip(self.grad_slots, self.shapes, vectors, strict=True)
        ]

    @torch.no_grad()
    def quad(self, vectors: Blocks) -> Tensor:
        if self.exact:
            return dot(vectors, self.products(vectors))
        u, _ = self.jvp(vectors)
        return dot([u], [self.curvature(u)])


class FoldedHessian(_Folded):
    """Exact Hessian of one batch: the derivative of the record of its gradient."""

    exact = True


class FoldedGGN(_Folded):
    """J^T S J of one batch: forward record, curvature at the output, transposed record."""

    exact = False


class _Program:
    """Steps to run in order, and the slots to let go after each."""

    def __init__(self, steps: list, num_slots: int):
        self.steps = steps
        self.num_slots = num_slots
        self.free: list[list[int]] = [[] for _ in steps]

    def reads(self) -> set[int]:
        return {s for step in self.steps for s in _flat(step.inputs)}

    def free_after_use(self, keep: set) -> None:
        last: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            for s in _flat(step.inputs):
                last[s] = i
            for s in step.outputs:
                if s is not None:
                    last.setdefault(s, i)
        for s, i in last.items():
            if s not in keep:
                self.free[i].append(s)

    def run(self, values: list[Tensor | None]) -> None:
        for step, free in zip(self.steps, self.free, strict=True):
            out = step.derivative(*(_gather(values, s) for s in step.inputs))
            outs = out if isinstance(out, tuple | list) else (out,)
            for slot, o in zip(step.outputs, outs, strict=True):
                if slot is not None:
                    values[slot] = o
            del out, outs
            for slot in free:
                values[slot] = None


def _flat(inputs: tuple[Slots, ...]) -> list[int]:
    out = []
    for s in inputs:
        out += [x for x in s if x is not None] if isinstance(s, list) else [s] * (s is not None)
    return out


def _gather(values: list[Tensor | None], slots: Slots):
    if isinstance(slots, list):
        return [None if s is None else values[s] for s in slots]
    return None if slots is None else values[slots]


def _owned(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.contiguous()
