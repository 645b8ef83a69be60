"""A program: the record of one batch as code, for other batches, parameters and vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast.curvature.losses.loss import OutputHessian
from fast.curvature.network.network import laid_out
from fast.curvature.network.parameter_space import Blocks
from fast.curvature.products.batch_loss import BatchLoss
from fast.curvature.products.batched import Folded
from fast.curvature.products.batched.passes import Passes
from fast.curvature.products.programs.code import Code
from fast.curvature.products.programs.trace import BranchChanged

# The segments of a record: the network, the layout of its output, the way back. Those of passes
# follow: a product has two segments, before and after the output's curvature, and a form has one.
FORWARD, LAYOUT, BACKWARD = range(3)
PASSES = "product", "form"


class Execution:
    """The segments of some code, run one after the other on values that they share."""

    def __init__(self, code: Code):
        self.code = code
        self.values: list[Any] = [None] * code.num_values

    @torch.no_grad()
    def __call__(self, segment: int, *inputs: Tensor) -> list[Tensor]:
        """The results of a segment for these inputs."""
        code, values = self.code, self.values
        for value, tensor in zip(code.inputs[segment], inputs, strict=True):
            values[value] = tensor
        # The operations are chosen already: no mode has to look at them again.
        with torch._C.DisableTorchFunction():
            code.functions[segment](values)
        return [values[value] for value in code.results[segment]]

    def product(self, segment: int, curvature: OutputHessian, vectors: Blocks, out: Blocks) -> None:
        """A pass from `segment` on, for the products that are written to `out`."""
        (u,) = self(segment, *vectors)
        self(segment + 1, curvature.product(u), *out)
        self._end_pass()

    def form(self, segment: int, curvature: OutputHessian, vectors: Blocks) -> Tensor:
        """A pass by `segment`, for v^T A v of each vector."""
        u, *terms = self(segment, *vectors)
        self._end_pass()
        return sum(terms, curvature.quad(u))

    def _end_pass(self) -> None:
        """Let go of what a pass has left."""
        for value in self.code.passing:
            self.values[value] = None


class Program:
    """What a trace of a batch's record has become.

    Args:
        part: the record that was traced.
        passes: the number of the segment that starts a pass, by its kind and number of vectors.
        num_vectors: number of vectors of a product.
    """

    def __init__(
        self, code: Code, part: Folded, passes: dict[tuple[str, int], int], num_vectors: int
    ):
        self.code, self.passes, self.num_vectors = code, passes, num_vectors
        self.exact, self.chunk, self.output_dim = part.exact, part.chunk, part.output_dim

    def linearize(self, of: BatchLoss, tensors: list[Tensor]) -> ProgramPasses:
        """The linearisation of a batch that the program fits to.

        Args:
            tensors: all tensors that the code of the network depends on, in the order of the trace.

        Raises:
            BranchChanged: data took the network's code another way.
        """
        execution = Execution(self.code)
        with of.scope(differentiable_twice=False):
            (raw,) = execution(FORWARD, *tensors)
            dim = of.class_dim(raw)
            if dim != self.output_dim:
                raise BranchChanged
            (z,) = execution(LAYOUT)
            y = laid_out(raw, of.batch.target, dim)[1]
            curvature = of.curvature(of.loss, z, y)
            execution(BACKWARD, of.loss.gradient(z, y) if self.exact else torch.zeros_like(z))
        return ProgramPasses(self, execution, (z, y), curvature)


class ProgramPasses(Passes):
    """One batch, linearised by a program, for products with `num_vectors` vectors.

    Args:
        answers: output and target.
        curvature: the matrix at the output.
    """

    def __init__(
        self,
        program: Program,
        execution: Execution,
        answers: tuple[Tensor, Any],
        curvature: OutputHessian,
    ):
        self.chunk, self.num_vectors = program.chunk, program.num_vectors
        self.passes, self.execution = program.passes, execution
        self.answers, self.weight, self.curvature = answers, 0.0, curvature

    def product_pass(self, vectors: Blocks, out: Blocks) -> None:
        segment = self.passes["product", len(vectors[0])]
        self.execution.product(segment, self.curvature, vectors, out)

    def form_pass(self, vectors: Blocks) -> Tensor:
        return self.execution.form(self.passes["form", len(vectors[0])], self.curvature, vectors)
