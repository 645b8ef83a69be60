"""Hessian, generalised Gauss-Newton and Fisher matrix of a network's loss, by their products."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fast.curvature.algorithms.arguments import check_whole
from fast.curvature.losses.loss import Loss, OutputHessian
from fast.curvature.losses.recognise import recognise
from fast.curvature.network.batches import Batch, Batches
from fast.curvature.network.double_backward import explain_not_finite
from fast.curvature.network.network import Network, Params, StrayParameter
from fast.curvature.network.parameter_space import Blocks
from fast.curvature.network.unchanged import fingerprint, same
from fast.curvature.operators.base import SymmetricOperator
from fast.curvature.operators.mean import WeightedMean
from fast.curvature.products.batched import FoldedGGN, FoldedHessian, UnsupportedOperation
from fast.curvature.products.looped import GraphGGN, GraphHessian, grad_or_none

METHODS = ("auto", "loop", "folded")


class Linearization(Protocol):
    """One batch at fixed parameters: cheap to multiply with, again and again.

    Attributes:
        answers: output, detached, and target, as the loss takes them.
        weight: of the batch in the mean over all data.
    """

    answers: tuple[Tensor, Any]
    weight: float

    def products(self, vectors: Blocks) -> Blocks: ...

    def quad(self, vectors: Blocks) -> Tensor: ...


class NetworkOperator(SymmetricOperator):
    """What Hessian, GGN and Fisher share: data, weighting, and the scope they are evaluated in.

    Args:
        model: any module, evaluated in the modes (train or eval) that its parts are in at the time
            of the product, at the parameters of that time. Nothing of it is changed: modes,
            buffers, `.grad` and random state stay as they were.
        loss_fn: a function (output, target) -> scalar; `F.cross_entropy`, `nn.CrossEntropyLoss`,
            `F.mse_loss`, `nn.MSELoss` (and partials of them) take closed forms. Classes are in
            dimension 1 of the output, or last where the labels' shape says so.
        data: one batch (x, y), a dict with "labels", or an iterable of batches that gives the same
            batches each time it is read. x may be a tensor, a tuple (`model(*x)`) or a dict
            (`model(**x)`).
        params: which parameters, in the model's order; default all. Names, tensors, a module of
            the model, a regular expression for whole names, or a function (name, tensor) -> bool.
        reduction: "mean" (batches weighted by what their mean is over, which is measured of losses
            that are not torch's; see `fast.curvature.Loss`) or "sum" (batch losses added up; the
            known losses are then sums themselves).
        method: "folded" pushes all vectors through a record of the gradient at once, "loop"
            differentiates the kept graph once per vector, "auto" takes the first where every
            operation of the network has a rule, but for single exact products of batches that are
            not kept. `explain()` tells.
        chunk: vectors per pass of "folded"; "auto" from `memory_budget`.
        memory_budget: bytes for their tangents; default 1 GiB, on a GPU a quarter of what is free.
        cache: keep what the products of a single batch share (activations, the record) from one
            product to the next, until parameters, buffers, data or the make-up of the modules
            (parts, modes, hooks, plain attributes) change. What a function or an object that is no
            module reads is not seen: call `refresh()` after changing that.
        process_group: each rank holds its own part of the data (and the same model); all ranks make
            the same calls with the same vectors, and get the same product over all data by one
            all-reduce (`torch.distributed.group.WORLD` for all ranks).
        seed: of dropout masks, the same at every product, and of sampled labels.

    Raises (at a product):
        SecondDerivativeError: the network or the loss has no second derivative, or none that is
            finite; the message names the module.
        ValueError: V, the parameters or the output are not finite, or what the loss divides
            several batches by cannot be known.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        params: Params = None,
        *,
        reduction: str = "mean",
        method: str = "auto",
        chunk: int | str = "auto",
        memory_budget: int | None = None,
        cache: bool = True,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ):
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}; got {method!r}")
        if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
            raise ValueError(f"chunk must be 'auto' or a positive number of vectors; got {chunk!r}")
        check_whole(seed=seed)
        if memory_budget is not None and not (
            isinstance(memory_budget, int) and memory_budget >= 1
        ):
            raise ValueError(f"memory_budget must be a number of bytes; got {memory_budget!r}")
        self.method = method
        self.chunk = chunk
        self.memory_budget = memory_budget
        self.process_group = process_group
        self.why_loop = ""  # with "auto": the operation that has no folded rule
        self.network = Network(model, params, seed)
        self.space = self.network.space
        self.loss_fn = loss_fn
        loss = recognise(loss_fn, reduction)  # an unknown one is refused here, not at a product
        ranks = 1 if process_group is None else dist.get_world_size(process_group)
        if loss.is_measured and ranks > 1:
            raise ValueError(
                "loss_fn in a process group: what its mean divides by is measured against the "
                "first batch, which each rank has another of. Give it, fast.curvature.Loss("
                "loss_fn, denominator=lambda output, target: ...), or reduction='sum'"
            )
        self.data = data if isinstance(data, Batches) else Batches(data)
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "method": method,
            "chunk": chunk,
            "memory_budget": memory_budget,
            "cache": cache,
            "process_group": process_group,
            "seed": seed,
        }
        self._cache: tuple[list[Any], Linearization] | None = None

    @property
    def loss(self) -> Loss:
        """As `loss_fn` is now: weights of a loss module may be exchanged."""
        return recognise(self.loss_fn, self.options["reduction"])

    @abc.abstractmethod
    def _loop(self, batch: Batch, index: int, loss: Loss) -> Linearization: ...

    @abc.abstractmethod
    def _folded(self, batch: Batch, index: int, loss: Loss) -> Linearization: ...

    def linearize(
        self, batch: Batch, index: int, loss: Loss, num_vectors: int | None = None
    ) -> Linearization:
        """Everything about one batch that its products share.

        Args:
            loss: of this pass over the data.
            num_vectors: that it will be used for; None: it is kept.
        """
        batch = batch.to(self.device)
        self.network.look_for_classes(batch, loss)
        part = self._linearize(batch, index, loss, num_vectors)
        part.weight = loss.weight(*part.answers, batch.size)
        return part

    def _linearize(
        self, batch: Batch, index: int, loss: Loss, num_vectors: int | None
    ) -> Linearization:
        dear = num_vectors is not None and self._prefers_loop(num_vectors)
        if self.method == "loop" or self.why_loop or (dear and self.method == "auto"):
            return self._loop(batch, index, loss)
        try:
            return self._folded(batch, index, loss)
        except StrayParameter:
            raise
        except Exception as error:
            if self.method == "folded":
                if isinstance(error, UnsupportedOperation):
                    raise UnsupportedOperation(
                        f"no folded rule for {error}: use method='auto' or 'loop'"
                    ) from error
                raise
            # Whatever is wrong with the network itself, the loop will say as well.
            self._take_loop(error)
            return self._loop(batch, index, loss)

    def _take_loop(self, error: Exception) -> None:
        unknown = isinstance(error, UnsupportedOperation)
        said = str(error) if unknown else f"{type(error).__name__}: {error}"
        self.why_loop = f"no folded rule for {said}" if unknown else f"the record failed ({said})"

    def linearizations(
        self, num_vectors: int, loss: Loss
    ) -> Iterator[tuple[int, Batch, Linearization]]:
        """Those of all batches, for so many products each, with index and batch."""
        for index, batch in enumerate(self.data):
            if self.data.single and self.options["cache"]:
                yield index, batch, self._cached(batch, loss)
                return
            yield index, batch, self.linearize(batch, index, loss, num_vectors)

    @torch.inference_mode(False)
    def _sum(
        self, vectors: Blocks, apply: Callable[[Linearization, Blocks], Blocks]
    ) -> WeightedMean:
        """The mean over batches of what `apply` makes of a linearisation."""
        vectors = [v.clone() if v.is_inference() else v for v in vectors]
        loss = self.loss
        mean = WeightedMean(loss.reduction, self.process_group)
        for index, batch, part in self.linearizations(vectors[0].shape[0], loss):
            try:
                value = apply(part, vectors)
            except Exception as error:
                if self.method != "auto" or not isinstance(part, FoldedHessian | FoldedGGN):
                    raise
                # A rule that fails at a tangent, as of types that it does not expect.
                self._take_loop(error)
                self._cache = None
                value = apply(self._loop(batch.to(self.device), index, loss), vectors)
            mean.reduction = loss.reduction
            mean.add(value, part.weight)
        return mean

    def _prefers_loop(self, num_vectors: int) -> bool:
        """Whether recording a batch for so few products costs more than it saves."""
        return False

    def _cached(self, batch: Batch, loss: Loss) -> Linearization:
        """That of a single batch is kept for the next product, while nothing has changed."""
        if self._cache is not None and same(self._cache[0], self._state(batch)):
            return self._cache[1]
        self._cache = None
        part = self.linearize(batch, 0, loss)
        # Of afterwards: a forward pass may itself count or keep something in the model.
        self._cache = (self._state(batch), part)
        return part

    def _state(self, batch: Batch) -> list[Any]:
        return fingerprint(self.network.model, pytree.tree_leaves(tuple(batch)), self.loss.state())

    def refresh(self) -> None:
        """Forget what is kept of a single batch, after a change that `cache` cannot see."""
        self._cache = None

    def explain(self) -> str:
        """How products are computed: the method, vectors per pass, and why not the other method."""
        with torch.inference_mode(False):
            part = next(self.linearizations(2, self.loss))[2]
        if isinstance(part, FoldedHessian | FoldedGGN):
            return f"folded, {part.chunk} vectors a pass"
        return "loop" + (f": {self.why_loop}" if self.why_loop else "")

    def products(self, vectors: Blocks) -> Blocks:
        found = self._sum(vectors, lambda part, v: part.products(v)).result(vectors)
        if not _finite(found) and self.method == "auto" and not self.why_loop:
            self.why_loop = "the record gave NaN or infinity"
            self._cache = None
            found = self._sum(vectors, lambda part, v: part.products(v)).result(vectors)
        if not _finite(found):
            raise self._not_finite(vectors)
        return found

    def _not_finite(self, vectors: Blocks) -> Exception:
        """What to say of products that are not."""
        if not _finite(vectors):
            return ValueError("V holds NaN or infinity: a product with it is not finite")
        if not _finite(self.network.selected(self.network.leaves())):
            return ValueError("a product is not finite: the parameters hold NaN or infinity")
        for index, batch in enumerate(self.data):
            batch = batch.to(self.device)
            loss = self.loss
            self.network.look_for_classes(batch, loss)
            part = self._loop(batch, index, loss)
            if not bool(part.answers[0].isfinite().all()):
                return ValueError(
                    f"a product is not finite: the network's output for batch {index} holds NaN or "
                    "infinity"
                )
            again = functools.partial(part.products, vectors)
            if (error := explain_not_finite(self.network, batch, index, again)) is not None:
                return error
        return ValueError(f"a product is not finite: it overflows {self.dtype}")

    def _quad(self, vectors: Blocks) -> Tensor:
        zeros = vectors[0].new_zeros(vectors[0].shape[0], dtype=torch.float64)
        if not len(zeros):
            return zeros
        found = self._sum(vectors, lambda part, v: [part.quad(v)]).result([zeros])[0]
        if not _finite([found]):
            raise self._not_finite(vectors)
        return found

    def _limits(self) -> tuple[int | None, int | None]:
        return (self.chunk if isinstance(self.chunk, int) else None), self.memory_budget

    def gradient(self) -> Tensor:
        """Gradient of the loss over all data, [P]."""
        return self.value_and_gradient()[1]

    @torch.inference_mode(False)
    def value_and_gradient(self) -> tuple[float, Tensor]:
        """The loss over all data, and its gradient, [P]."""
        loss_fn = self.loss
        mean = WeightedMean(loss_fn.reduction, self.process_group)
        for index, batch in enumerate(self.data):
            batch = batch.to(self.device)
            with self.network.scope(index, differentiable_twice=False):
                leaves = self.network.leaves()
                params = self.network.selected(leaves)
                z, y = self.network.answers(leaves, batch, loss_fn)
                self.network.refuse_strays(z, leaves)
                value = loss_fn.value(z, y)
                grads = grad_or_none([value], params)
                weight = loss_fn.weight(z.detach(), y, batch.size)
            rows = [
                torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)
            ]
            mean.reduction = loss_fn.reduction
            mean.add([value.detach()[None], *(g.detach()[None] for g in rows)], weight)
        zeros = self.space.zeros(1)
        loss, *gradient = mean.result([zeros[0].new_zeros(1), *zeros])
        return float(loss), self.space.join(gradient)[0]

    def blocks(self, by: str | Mapping[str, Params] = "layer") -> dict[str, NetworkOperator]:
        """Principal blocks, by "layer" (parameters of one module), "parameter", or your own groups.

        Args:
            by: or a dict name -> parameters (as `params`), e.g. one entry per optimizer group.
        """
        if isinstance(by, Mapping):
            return {name: self.block(group) for name, group in by.items()}
        if by not in ("layer", "parameter"):
            raise ValueError(f"by must be 'layer', 'parameter' or a dict of groups; got {by!r}")
        groups: dict[str, list[str]] = {}
        for name in self.space.names:
            groups.setdefault(name if by == "parameter" else name.rpartition(".")[0], []).append(
                name
            )
        return {name: self.block(names) for name, names in groups.items()}

    def block(self, params: Params) -> NetworkOperator:
        """The principal block of some of the parameters, as an operator of its own."""
        return type(self)(self.network.model, self.loss_fn, self.data, params, **self.options)


class Hessian(NetworkOperator):
    """Exact Hessian of the loss; symmetric, in general indefinite."""

    def _prefers_loop(self, num_vectors: int) -> bool:
        # One product of ResNet-20 takes 3.6 gradients recorded and 3.3 by the loop; of an MLP, a
        # head, MiniLM and a ViT, where neither is ahead by more than 7 %, as long.
        # On a GPU, Python records while the device waits: of ViT-S on an H200 that is 2.7 gradients
        # more than the loop starts with, and a product 0.57 less.
        return num_vectors < (5 if self.device.type == "cuda" else 2)

    def _loop(self, batch: Batch, index: int, loss: Loss) -> Linearization:
        return GraphHessian(self.network, loss, batch, index)

    def _folded(self, batch: Batch, index: int, loss: Loss) -> Linearization:
        return FoldedHessian(self.network, loss, batch, index, _output_hessian, *self._limits())


def _finite(blocks: Blocks) -> bool:
    """With one wait for the device."""
    return bool(torch.stack(torch._foreach_norm(blocks, math.inf)).isfinite().all())


def _output_hessian(loss: Loss, z: Tensor, y: Any) -> OutputHessian:
    return loss.hessian(z, y)


class GGN(NetworkOperator):
    """Generalised Gauss-Newton matrix J^T H_L J (Schraudolph 2002): the Hessian of the loss with
    the network linearised at its parameters. Positive semidefinite for a convex loss; equal to the
    Fisher matrix for cross-entropy and squared error. Needs one derivative of the network only.

    Of a loss that is linear in the output, as NLLLoss is in log-probabilities, it is zero: take the
    logits for the output, and CrossEntropyLoss.
    """

    def _prefers_loop(self, num_vectors: int) -> bool:
        # A table of 30,000 x 128 and a head, 512 tokens: 6.2 ms recorded, 4.9 by the loop, most of
        # it for writing gradients that are nearly all zero.
        if self.device.type == "cuda":  # as of the Hessian; its record holds half the operations
            return num_vectors < 4
        return num_vectors == 1 and self.network.mostly_embeddings

    def _loop(self, batch: Batch, index: int, loss: Loss) -> Linearization:
        return GraphGGN(self.network, loss, batch, index, self._curvature)

    def _folded(self, batch: Batch, index: int, loss: Loss) -> Linearization:
        return FoldedGGN(self.network, loss, batch, index, self._curvature, *self._limits())

    def _curvature(self, loss: Loss, z: Tensor, y: Any) -> OutputHessian:
        return loss.hessian(z, y)


class Fisher(GGN):
    """Fisher matrix from per-sample gradients: mean over samples of g g^T.

    kind="mc": labels drawn from the network's predictive distribution (seeded, the same at every
    product); an unbiased estimate of the GGN for cross-entropy and squared error. No label needed:
    data may be x, or batches of x (two of them as [(x1, None), (x2, None)], for [x, y] is one
    labelled batch).
    kind="empirical": the labels of the data (Kunstner et al. 2019 on why that is another matrix).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        params: Params = None,
        *,
        kind: str = "mc",
        **options: Any,
    ):
        if kind not in ("mc", "empirical"):
            raise ValueError(f"kind must be 'mc' or 'empirical'; got {kind!r}")
        if kind == "mc" and not isinstance(data, Batches):
            data = Batches(data, labels=None)
        super().__init__(model, loss_fn, data, params, **options)
        self.kind = kind
        self.options["kind"] = kind

    def _curvature(self, loss: Loss, z: Tensor, y: Any) -> OutputHessian:
        residual = loss.residual if self.kind == "empirical" else loss.sampled_residual
        r, scale = residual(z, y)

        def product(u: Tensor) -> Tensor:
            s = torch.linalg.vecdot(loss.rows(u), r[None])[..., None] * (r * scale)
            return loss.unrows(s, z.shape)

        return OutputHessian.of(product)
