"""v^T H v of an exact Hessian, at about half the cost of the product H v.

Let d_x be the tangent of a value x along v, u that of the output, S the loss's Hessian there, and
g_x the gradient in x. Hold the gradient that comes into each operation fixed, and let e_x be what
the tangents of its inputs alone make of the gradients that it gives back. Then

    v^T H v = u^T S u + sum_x <e_x, d_x>

over all values x and parameters, because pulling a change of g_x back to the parameters, and
multiplying with v there, is the same as multiplying with d_x at once. An operation f adds
g . D^2 f[d, d]; where it is linear in its parameters w, this is g . (D^2 f[a, a] + 2 D^2 f[a, w])
with a the tangents of its other inputs. The last term is found in the gradients of w alone, and a
layer costs three products (two on the way to u, one for e_w) in place of six.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fast.curvature.network.parameter_space import dot
from fast.curvature.products.batched.gradient_record import GradientRecord
from fast.curvature.products.batched.tape import VIEWS, Operation, Slots, flat
from fast.curvature.products.rules.base import Tangent

# Arguments in which an operation is linear, all of them together.
LINEAR_IN: dict[str, list[set[int]]] = {
    "aten.convolution.default": [{1, 2}],
    "aten.native_batch_norm.default": [{1, 2}],
    "aten.native_layer_norm.default": [{2, 3}],
    "aten.addmm.default": [{0, 1}, {0, 2}],
    "aten.mm.default": [{0}, {1}],
    "aten.bmm.default": [{0}, {1}],
    "aten.mul.Tensor": [{0}, {1}],
    "aten.add.Tensor": [{0, 1}],
    "aten.embedding.default": [{0}],
}
SUMS = {"aten.add.Tensor", "aten.sum.dim_IntList", "aten._to_copy.default"}


class SecondOrder:
    """The operations that make v^T H v - u^T S u from the tangents of values.

    Args:
        record: an exact record. Its tape gets slots for the sums.

    Attributes:
        operations: in their order; they follow the forward pass.
        total: the slot of the result, or None where it is zero.
    """

    def __init__(self, record: GradientRecord):
        self.tape, self.value_of = record.forward_tape, record.value_of
        self.forward, self.backward = record.forward, record.backward
        pairs = zip(record.gradient_slots, record.parameter_slots, strict=True)
        self.parameters = [(g, p) for g, p in pairs if g is not None]
        linear = _linear(self.forward, [p for _, p in self.parameters])
        if not self._build(linear, record.cotangent_slot) and linear:
            self._build(set(), record.cotangent_slot)

    def _build(self, linear: set[int], cotangent: int) -> bool:
        """Make the operations; whether each change of a gradient meets a tangent first of all.

        It does not where the backward pass computes values again (checkpointing), or takes several
        operations to the derivative of one. Then parameters have to move like other values.

        Args:
            linear: the parameters that do not move, for the network is linear in them.
        """
        self.operations: list[Operation] = []
        self.total: int | None = None
        values = {s for operation in self.forward for s in flat(operation.outputs)}
        moving = values.union(p for _, p in self.parameters) - linear
        gradients, is_plain = {cotangent}, True
        for operation in self.backward:
            inputs, outputs = flat(operation.inputs), flat(operation.outputs)
            if outputs and operation.name not in VIEWS | SUMS:
                is_plain &= bool(gradients & {*inputs}) and not gradients & moving & {*inputs}
            if gradients & {*inputs}:
                gradients |= {*outputs}
            if not moving & {*inputs}:
                continue
            self.operations.append(_restricted(operation, moving))
            for slot in outputs:
                if (value := self.value_of.get(slot)) is not None:
                    self._add(slot, value, linear)
                else:
                    moving.add(slot)
        for gradient, value in self.parameters:
            if gradient in moving:
                self._add(gradient, value, linear)
        return is_plain

    def _add(self, gradient: int, value: int, linear: set[int]) -> None:
        """Add the product of the tangents of a gradient and of its value to the total."""
        before, self.total = self.total, self.tape.new_sum()
        term = functools.partial(_term, 2 if value in linear else 1)
        self.operations.append(
            Operation(
                name="form",
                derivative=term,
                inputs=(gradient, value, before),
                outputs=(self.total,),
            )
        )


def _linear(forward: list[Operation], parameters: Iterable[int]) -> set[int]:
    """Parameters that every operation is linear in, and views of them."""
    origin = {p: p for p in parameters}
    others: set[int] = set()
    for operation in forward:
        slots = enumerate(operation.inputs)
        places = {i for i, s in slots if not origin.keys().isdisjoint(flat([s]))}
        origins = {origin[s] for s in flat(operation.inputs) if s in origin}
        if origins and operation.name in VIEWS | {"aten._to_copy.default"}:
            origin |= {s: p for s in flat(operation.outputs) for p in origins}
        elif not any(places <= linear for linear in LINEAR_IN.get(operation.name, [])):
            others |= origins
    return {s for s, p in origin.items() if p not in others}


def _restricted(operation: Operation, moving: set[int]) -> Operation:
    """The operation, with tangents of none but the slots `moving`."""
    inputs = tuple(_those(s, moving) for s in operation.inputs)
    derivative = functools.partial(_derivative, operation.derivative, len(operation.outputs))
    return replace(operation, inputs=inputs, derivative=derivative)


def _those(slots: Slots, moving: set[int]) -> Slots:
    if isinstance(slots, list):
        return [s if s in moving else None for s in slots]
    return slots if slots in moving else None


def _derivative(derivative: Any, num_outputs: int, *inputs: Any) -> Any:
    """The derivative, which is None where no argument moves."""
    if not flat(inputs):
        return (None,) * num_outputs
    return derivative(*inputs)


def _term(factor: int, gradient: Tangent, value: Tangent, total: Tensor | None) -> Tensor | None:
    """The total, and `factor` times the product of two tangents."""
    if gradient is None or value is None:
        return total
    term = dot([gradient], [value])
    term = term if factor == 1 else term * factor
    return term if total is None else total + term
