"""The programs of one operator, found by what they depend on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fast.curvature.network.network import Network
from fast.curvature.network.parameter_space import Blocks
from fast.curvature.network.snapshot import Watch
from fast.curvature.products.batch_loss import BatchLoss
from fast.curvature.products.batched import Folded
from fast.curvature.products.batched.passes import Passes
from fast.curvature.products.programs.code import Code
from fast.curvature.products.programs.conditions import draws, make_up, modes, shapes
from fast.curvature.products.programs.program import PASSES, Program, ProgramPasses
from fast.curvature.products.programs.reads import Reads
from fast.curvature.products.programs.trace import BranchChanged
from fast.curvature.products.programs.tracer import Tracer

# This many programs are kept for inputs of one make-up. They differ in what their code has read
# from the data.
MOST_BRANCHES = 4
# This many make-ups of inputs (mostly sequence lengths) are kept. Their code holds no activations.
MOST_KEPT = 32


class Programs:
    """Records the first batch of each make-up, traces the second, and runs the program on all more.

    A program fits batches whose inputs have the same structure, shapes, strides and types, for one
    number of vectors, as long as the model's parts, modes, hooks, attributes and the shapes of its
    tensors are the same, and its code reads the same numbers from data. A network that cannot be
    traced is recorded batch by batch.

    Attributes:
        why: why a network could not be traced: the last reason, or empty.
    """

    def __init__(self, network: Network, *, compile: bool = False):
        self.network, self.compile = network, compile
        self.why = ""
        self.forget()

    def forget(self) -> None:
        """Drop all programs."""
        self._watch: Watch | None = None
        # By what a program depends on: the programs, or None where the network cannot be traced.
        self._programs: dict[Any, list[Program] | None] = {}
        # What the network's code depends on besides its inputs: parameters and buffers, and the
        # tensors that are other attributes.
        self._tensors: list[Tensor] = []
        self._others: list[Tensor] = []

    def __len__(self) -> int:
        return sum(len(programs or ()) for programs in self._programs.values())

    def linearize(
        self, record: Callable[..., Folded], of: BatchLoss, num_vectors: int
    ) -> Folded | ProgramPasses:
        """The linearisation of one batch for products with `num_vectors` vectors.

        Args:
            record: makes a record, given the `segment` that surrounds its parts.
        """
        self._look()
        inputs = [t for t in pytree.tree_leaves(of.batch.inputs) if isinstance(t, Tensor)]
        layouts = shapes([*self._tensors, *inputs])
        if layouts is None:
            self.why = "a tensor of the network or its inputs is nested, sparse or of another class"
            return record()
        device = self.network.space.device
        key = (num_vectors, modes(device), make_up(of.batch), *map(tuple, layouts))
        if key not in self._programs:
            self._programs[key] = []
            while len(self._programs) > MOST_KEPT:
                del self._programs[next(iter(self._programs))]
            return record()
        programs = self._programs[key]
        if programs is None:
            return record()
        tensors = [*self._tensors, *inputs, *self._others]

        def replay(program: Program) -> ProgramPasses:
            return program.linearize(of, tensors)

        for program in programs:
            try:
                return replay(program)
            except BranchChanged:
                continue
        if len(programs) == MOST_BRANCHES:
            self._refuse(key, "what the network's code reads from data differs from batch to batch")
            return record()
        return self._trace(key, record, tensors, replay)

    def _look(self) -> None:
        """Forget all programs where the model is no longer the one that they were made of."""
        if self._watch is not None and self._watch.holds():
            return
        self.forget()
        self._watch = watch = Watch(self.network.model)
        parameters = dict(self.network.model.named_parameters()).values()
        self._tensors = [*parameters, *self.network.model.buffers()]
        named = set(map(id, self._tensors))
        self._others = [t for t in watch.tensors() if id(t) not in named]

    def _refuse(self, key: Any, why: str) -> None:
        self._programs[key], self.why = None, why

    def _trace(
        self,
        key: Any,
        record: Callable[..., Folded],
        tensors: list[Tensor],
        replay: Callable[[Program], ProgramPasses],
    ) -> Folded:
        """A record, which leaves a program where its network can be traced."""
        num_params = len(list(self.network.model.parameters()))
        # The record makes leaves of the parameters, and declares those itself.
        tracer, before = Tracer(tensors[num_params:]), draws()
        with Reads(tracer.refuse):
            part = record(segment=tracer.segment)
        assert self._watch is not None
        if not self._watch.holds():
            tracer.refuse("the network changes its own attributes as it runs")
        if draws() != before:
            tracer.refuse("the network draws random numbers that torch does not seed")
        if not tracer.why:
            program = self._program_of(part, tracer, key[0], replay)
            if program is not None:
                self._programs[key] = [*(self._programs[key] or ()), program]
                return part
        self._refuse(key, tracer.why)
        return part

    def _program_of(
        self,
        part: Folded,
        tracer: Tracer,
        num_vectors: int,
        replay: Callable[[Program], ProgramPasses],
    ) -> Program | None:
        """The program of a record and of its passes, which are traced here; None where it is wrong.

        The program is run on the record's own batch, and has to give what the record gives.
        """
        sizes = {min(part.chunk, num_vectors), num_vectors % part.chunk} - {0}
        passes: dict[tuple[str, int], int] = {}
        truths: list[Blocks] = []
        with part.traced(tracer.segment):
            for kind, size in itertools.product(PASSES, sizes):
                passes[kind, size] = tracer.start_pass()
                truths.append(self._pass_with_ones(part, kind, size))
        if tracer.why:
            return None
        code = Code(tracer.trace, [*passes.values()], compile=self.compile)
        program = Program(code, part, passes, num_vectors)
        again = replay(program)
        for which, truth in zip(passes, truths, strict=True):
            if not _agree(self._pass_with_ones(again, *which), truth):
                tracer.refuse("the network's program gives another product than its record")
                return None
        return program

    @torch.no_grad()
    def _pass_with_ones(self, part: Passes, kind: str, size: int) -> Blocks:
        """What a pass gives for `size` vectors of ones."""
        vectors = [torch.ones_like(v) for v in self.network.space.zeros(size)]
        if kind == "form":
            return [part.form_pass(vectors).to(vectors[0].dtype)]
        out = list(map(torch.empty_like, vectors))
        part.product_pass(vectors, out)
        return out


def _agree(a: Blocks, b: Blocks) -> bool:
    """Whether two products are equal but for rounding: kernels may round by where memory lies."""
    return all(
        float((x - y).norm()) <= torch.finfo(x.dtype).eps ** 0.5 * float(y.norm())
        for x, y in zip(a, b, strict=True)
    )
