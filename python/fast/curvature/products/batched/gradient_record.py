"""The record of one batch: its gradient is computed, and every operation on the way is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast.curvature.losses.loss import OutputHessian
from fast.curvature.network.evaluation import StopGradients
from fast.curvature.network.network import laid_out
from fast.curvature.products.batch_loss import BatchLoss
from fast.curvature.products.batched.passes import Segment
from fast.curvature.products.batched.recorder import Recorder
from fast.curvature.products.batched.tape import Operation, Tape
from fast.curvature.products.looped import grad_or_none
from fast.curvature.products.rules import UnsupportedOperation


@dataclass(frozen=True, kw_only=True)
class GradientRecord:
    """The operations of a gradient, and the slots at both ends of its two halves.

    An exact record is one tape: its backward pass reads what the forward pass has made. That of a
    GGN is two tapes, with slots of their own, for its backward pass is linear in the cotangent and
    everything else in it is fixed.

    Attributes:
        exact: which of the two it is.
        forward_tape, backward_tape: the same tape twice, where the record is exact.
        split: number of operations of the forward pass.
        parameter_slots: on the forward tape, in the order of the parameters.
        output_slot: on the forward tape; None where the output does not depend on the parameters.
        cotangent_slot: that of the gradient in the output, on the backward tape.
        gradient_slots: on the backward tape, in the order of the parameters; None where the
            gradient does not depend on the cotangent.
        value_of: slot of a gradient -> slot of the value that it is the gradient in (exact alone).
        answers: the detached output and the target, laid out as the loss takes them.
        output_dim: the dimension of the output that was moved to dimension 1 for this.
        curvature: the matrix at the output.
    """

    exact: bool
    forward_tape: Tape
    backward_tape: Tape
    split: int
    parameter_slots: list[int]
    output_slot: int | None
    cotangent_slot: int
    gradient_slots: list[int | None]
    value_of: dict[int, int]
    answers: tuple[Tensor, Any]
    output_dim: int
    curvature: OutputHessian

    @property
    def forward(self) -> list[Operation]:
        """The operations from the parameters to the output."""
        return self.forward_tape.operations[: self.split]

    @property
    def backward(self) -> list[Operation]:
        """The operations from the cotangent to the gradient."""
        return self.backward_tape.operations[self.split if self.exact else 0 :]

    @property
    def gradients(self) -> set[int]:
        """The slots of the gradients that depend on the cotangent."""
        return {s for s in self.gradient_slots if s is not None}


def record_gradient(of: BatchLoss, *, exact: bool, segment: Segment) -> GradientRecord:
    """Compute the gradient of one batch, and record it.

    Args:
        exact: whether the record is for the Hessian, and not for the GGN.
        segment: surrounds the network, the layout of its output, and the way back.

    Raises:
        UnsupportedOperation: an operation has no rule.
    """
    recorder, network = Recorder(exact), of.network
    with of.scope(differentiable_twice=False):
        leaves = network.leaves()
        params = network.selected(leaves)
        parameter_slots = [recorder.activate(p) for p in params]
        raw = _record_network(of, leaves, recorder, segment)
        dim = of.class_dim(raw)
        with segment() as returns, recorder:
            z, y = laid_out(raw, of.batch.target, dim)
            output = z.detach()
            returns(output)
        del raw
        output_slot = recorder.slot(z)
        if z.requires_grad != (output_slot is not None):
            raise UnsupportedOperation("the custom autograd function that makes the output")
        curvature = of.curvature(of.loss, output, y)
        # Only the shape of a GGN's cotangent matters, and there may be no label to compute it.
        cotangent = of.loss.gradient(output, y) if exact else torch.zeros_like(output)
        split = recorder.start_backward()
        cotangent_slot = recorder.activate(cotangent)
        with segment(cotangent), recorder:
            grads = grad_or_none([z], params, [cotangent])
        gradient_slots = [None if g is None else recorder.slot(g) for g in grads]
        del z, grads
    forward_tape, backward_tape = recorder.finish()
    return GradientRecord(
        exact=exact,
        forward_tape=forward_tape,
        backward_tape=backward_tape,
        split=split,
        parameter_slots=parameter_slots,
        output_slot=output_slot,
        cotangent_slot=cotangent_slot,
        gradient_slots=gradient_slots,
        value_of=recorder.value_of,
        answers=(output, y),
        output_dim=dim,
        curvature=curvature,
    )


def _record_network(
    of: BatchLoss, leaves: Mapping[str, Tensor], recorder: Recorder, segment: Segment
) -> Tensor:
    """The output of the network, which is recorded."""
    names = of.network.names_by_id().items()
    recorder.originals = {i: n for i, n in names if n in of.network.names}
    stop = StopGradients(recorder.forget)
    with segment(*leaves.values()) as returns, stop, recorder:
        output = of.network.outputs(leaves, of.batch.inputs)
        returns(output)
    return output
