"""A record that runs again: on other batches, at other parameters, with other vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fast.curvature.losses.loss import Loss
from fast.curvature.network.batches import Batch
from fast.curvature.network.network import Network, laid_out
from fast.curvature.network.parameter_space import Blocks
from fast.curvature.products.batched.linearize import Folded
from fast.curvature.products.batched.passes import Passes
from fast.curvature.products.looped import OutputCurvature
from fast.curvature.products.programs.source import Source
from fast.curvature.products.programs.tracer import Diverged

# The segments of a record: the network, the layout of its output, the way back. Passes follow: a
# product has two segments, before and after the output's curvature, and a form has one.
FORWARD, LAYOUT, BACKWARD, FIRST_PASS = range(4)
PASSES = "product", "form"


class Run:
    """One run of a program's segments, which share values."""

    def __init__(self, source: Source):
        self.source = source
        self.values: list[Any] = [None] * len(source.slots)

    @torch.no_grad()
    def __call__(self, segment: int, *inputs: Tensor) -> list[Tensor]:
        source, values = self.source, self.values
        for slot, tensor in zip(source.inputs[segment], inputs, strict=True):
            values[slot] = tensor
        # The operations are chosen already: no mode has to look at them again.
        with torch._C.DisableTorchFunction():
            source.code[segment](values)
        return [values[slot] for slot in source.results[segment]]

    def end_pass(self) -> None:
        """Let go of what a pass has left."""
        for value in self.source.passing:
            self.values[self.source.slots[value]] = None


class Program:
    """What `trace` makes of a record.

    Attributes:
        passes: the number of the segment that starts a pass, by its kind and number of vectors.
    """

    def __init__(
        self, source: Source, part: Folded, passes: dict[tuple[str, int], int], num_vectors: int
    ):
        self.source, self.passes, self.num_vectors = source, passes, num_vectors
        self.exact, self.chunk, self.output_dim = part.exact, part.chunk, part.output_dim

    def linearize(
        self,
        network: Network,
        loss: Loss,
        batch: Batch,
        index: int,
        curvature: OutputCurvature,
        given: list[Tensor],
    ) -> Replay:
        """The linearization of a batch that the program fits to.

        Raises:
            Diverged: data took the code another way.
        """
        run = Run(self.source)
        with network.scope(index, differentiable_twice=False):
            (raw,) = run(FORWARD, *given)
            dim = loss.class_dim(raw, batch.target, network.class_dim)
            if dim != self.output_dim:
                raise Diverged
            (z,) = run(LAYOUT)
            y = laid_out(raw, batch.target, dim)[1]
            output = curvature(loss, z, y)
            run(BACKWARD, loss.gradient(z, y) if self.exact else torch.zeros_like(z))
        part = Replay(self, run, output.product, output.quad)
        part.answers = z, y
        return part


class Replay(Passes):
    """One batch, linearized by a program, for products with `num_vectors` vectors."""

    answers: tuple[Tensor, Any]

    def __init__(
        self,
        program: Program,
        run: Run,
        product: Callable[[Tensor], Tensor],
        quad: Callable[[Tensor], Tensor],
    ):
        self.exact, self.chunk, self.passes = program.exact, program.chunk, program.passes
        self.num_vectors = program.num_vectors
        self.run, self.weight = run, 0.0
        self.output_product, self.output_quad = product, quad

    def _product(self, vectors: Blocks, out: Blocks) -> None:
        segment = self.passes["product", len(vectors[0])]
        (u,) = self.run(segment, *vectors)
        self.run(segment + 1, self.output_product(u), *out)
        self.run.end_pass()

    def _quad(self, vectors: Blocks) -> Tensor:
        u, *terms = self.run(self.passes["form", len(vectors[0])], *vectors)
        self.run.end_pass()
        return sum(terms, self.output_quad(u))
