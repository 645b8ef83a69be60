"""How an operator linearises one batch: by a record, or by autograd's loop, once or to be kept."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fast.curvature.losses.loss import Loss, OutputHessian
from fast.curvature.network.batches import Batch, Batches
from fast.curvature.network.network import Network, StrayParameter
from fast.curvature.network.parameter_space import Blocks
from fast.curvature.network.snapshot import Snapshot
from fast.curvature.operators.base import SymmetricOperator
from fast.curvature.operators.settings import Settings
from fast.curvature.products.batch_loss import BatchLoss
from fast.curvature.products.batched import Folded, RuleError, UnsupportedOperation
from fast.curvature.products.batched.passes import Passes
from fast.curvature.products.programs.cached_record import CachedRecord
from fast.curvature.products.programs.program import ProgramPasses
from fast.curvature.products.programs.programs import Programs
from fast.errors import warn


class Linearization(Protocol):
    """One batch at fixed parameters: cheap to multiply with, again and again.

    Attributes:
        answers: the detached output and the target, laid out as the loss takes them.
        weight: what the batch weighs in the mean over all data.
    """

    answers: tuple[Tensor, Any]
    weight: float

    def products(self, vectors: Blocks) -> Blocks:
        """One [K, *shape] block per parameter in, the same out."""

    def quad(self, vectors: Blocks) -> Tensor:
        """v^T A v of every vector, [K]."""


class Linearizer(SymmetricOperator):
    """The part of a `NetworkOperator` that chooses how a batch is linearised, and keeps the result.

    A kind of matrix says what a record is (`_record_class`), how the loop goes (`_loop_class`), and
    what the matrix at the network's output is (`_output_curvature`).

    Attributes:
        programs: the network's record as code, for batches that are not kept.
        why_loop: with method "auto", why products take the loop; empty where they do not have to.
    """

    _record_class: type[Folded]
    _loop_class: Callable[[BatchLoss], Linearization]
    settings: Settings
    data: Batches
    network: Network

    def _use(self, network: Network) -> None:
        """Take another network, of which nothing is kept yet."""
        self.network, self.space = network, network.space
        self.programs = Programs(network, compile=self.settings.compile)
        self.why_loop = ""
        # The state of a single batch and of the network, and the linearisation at that state.
        self._cache: tuple[Snapshot, Linearization] | None = None

    @property
    @abc.abstractmethod
    def loss(self) -> Loss:
        """The loss as it is now."""

    def __getstate__(self) -> dict[str, Any]:
        # Graphs and programs can be neither copied nor pickled.
        programs = Programs(self.network, compile=self.settings.compile)
        return {**vars(self), "programs": programs, "_cache": None}

    def _output_curvature(self, loss: Loss, z: Tensor, y: Any) -> OutputHessian:
        """The matrix at the network's output."""
        return loss.hessian(z, y)

    def _batch_loss(self, batch: Batch, index: int, loss: Loss) -> BatchLoss:
        return BatchLoss(
            network=self.network,
            loss=loss,
            batch=batch.to(self.device),
            index=index,
            curvature=self._output_curvature,
        )

    def _loop(self, batch: Batch, index: int, loss: Loss) -> Linearization:
        """Linearise a batch by autograd alone, for products one vector after the other."""
        return self._loop_class(self._batch_loss(batch, index, loss))

    def linearize(
        self, batch: Batch, index: int, loss: Loss, num_vectors: int | None = None
    ) -> Linearization:
        """Compute everything about one batch that its products share.

        Args:
            loss: the `Loss` of this pass over the data.
            num_vectors: number of vectors of the products that will be taken; None for any number.
        """
        of = self._batch_loss(batch, index, loss)
        if self.settings.method == "loop" or self.why_loop:
            part = self._loop_class(of)
        else:
            part = self._folded_if_possible(of, num_vectors)
        self.network.refuse_penalty(loss, *part.answers)
        part.weight = loss.weight(*part.answers, batch.size)
        return part

    def _folded_if_possible(self, of: BatchLoss, num_vectors: int | None) -> Linearization:
        """By a record; with method "auto" by the loop where that fails."""
        try:
            return self._folded(of, num_vectors)
        except StrayParameter:
            raise
        except UnsupportedOperation as error:
            reason = f"no folded rule for {error}"
            if self.settings.method == "folded":
                raise UnsupportedOperation(f"{reason}: use method='auto' or 'loop'") from error
            self.why_loop = reason
            return self._loop_class(of)
        except Exception as error:
            if self.settings.method == "folded":
                raise
            # Where the network itself is at fault, the loop raises as well, and no rule is blamed.
            part = self._loop_class(of)
            self._fall_back(error)
            return part

    def _folded(self, of: BatchLoss, num_vectors: int | None) -> Linearization:
        """By a record, or by the program that an earlier record has left."""
        settings = self.settings
        chunk = settings.chunk if isinstance(settings.chunk, int) else None
        limits = chunk, settings.memory_budget, settings.gemm
        record = functools.partial(self._record_class, of, *limits)
        return self.programs.linearize(record, of, num_vectors) if num_vectors else record()

    def _take_loop(self, why: str) -> None:
        """Take the loop from now on."""
        self.why_loop, self._cache = why, None

    def _fall_back(self, error: Exception) -> None:
        """Take the loop from now on, and say so once: a rule failed that should not."""
        name = "" if isinstance(error, RuleError) else f"{type(error).__name__}: "
        self._take_loop(f"the record failed ({name}{error})")
        warn(
            f"{type(self).__name__}: {self.why_loop}. Products are right, but computed one vector "
            "after the other, which is slower; method='loop' does that without this warning. "
            "Please report the operation",
            RuntimeWarning,
        )

    def linearizations(
        self, num_vectors: int, loss: Loss
    ) -> Iterator[tuple[int, Batch, Linearization]]:
        """Index, batch and linearisation of every batch, each for `num_vectors` products."""
        for index, batch in enumerate(self.data):
            if self.data.single and self.settings.cache:
                yield index, batch, self._cached(batch, loss, num_vectors)
                return
            yield index, batch, self.linearize(batch, index, loss, num_vectors)

    def _cached(self, batch: Batch, loss: Loss, num_vectors: int) -> Linearization:
        """The linearisation of a single batch, kept from one product to the next."""
        count: int | None = num_vectors
        others = [*pytree.tree_leaves(tuple(batch)), *self.loss.state()]
        if self._cache is not None and self._cache[0].holds(others):
            part = self._cache[1]
            if not isinstance(part, ProgramPasses) or part.num_vectors == num_vectors:
                return part
            count = None  # products come in several sizes: a record serves them all
        self._cache = None
        part = self.linearize(batch, 0, loss, count)
        if isinstance(part, Folded):
            part = CachedRecord(part, compile=self.settings.compile)
        # The state is taken afterwards: a forward pass may itself count or keep something.
        self._cache = (Snapshot(self.network.model, others), part)
        return part

    def refresh(self) -> None:
        """Forget what is kept of batches and of the network's code, after a change that the
        operator cannot see."""
        self._cache = None
        self.programs.forget()

    def explain(self) -> str:
        """How products are computed: the method, vectors per pass, and why not the other method."""
        with torch.inference_mode(False):
            part = next(self.linearizations(2, self.loss))[2]
        if isinstance(part, Passes):
            anew = f", each batch recorded anew: {self.programs.why}" if self.programs.why else ""
            by = " by inductor's code" if self.settings.compile else ""
            products = f", {self.settings.gemm} products" if self.settings.gemm else ""
            return f"folded, {part.chunk} vectors a pass{by}{products}{anew}"
        return "loop" + (f": {self.why_loop}" if self.why_loop else "")
