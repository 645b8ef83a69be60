"""What Hessian, GGN and Fisher share: the data, the mean over all batches, blocks and checks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fast.curvature.algorithms.check import Finding
from fast.curvature.losses.loss import Loss
from fast.curvature.losses.recognise import recognise
from fast.curvature.network.batches import Batches
from fast.curvature.network.double_backward import explain_not_finite
from fast.curvature.network.network import Network, Params
from fast.curvature.network.parameter_space import Blocks
from fast.curvature.operators.linearizer import Linearization, Linearizer
from fast.curvature.operators.mean import WeightedMean
from fast.curvature.operators.self_check import (
    Answer,
    data_finding,
    denominator_findings,
    difference_findings,
    difference_tolerance,
    dropout_finding,
    in_float64,
)
from fast.curvature.operators.settings import Settings
from fast.curvature.products.batched.passes import Passes
from fast.curvature.products.looped import grad_or_none
from fast.curvature.products.precision import backends


class NetworkOperator(Linearizer):
    """A curvature matrix of a network's loss over some data; see its kinds, Hessian, GGN, Fisher.

    Args:
        model: any module. It is evaluated in the modes (train or eval) that its parts are in at the
            time of the product, at the parameters of that time, and left unchanged: modes, buffers,
            `.grad` and random state stay as they were.
        loss_fn: a function (output, target) -> scalar; `F.cross_entropy`, `nn.CrossEntropyLoss`,
            `F.mse_loss`, `nn.MSELoss` (and partials of them) take closed forms. Classes are in
            dimension 1 of the output, or last where the labels' shape says so.
        data: one batch (x, y), a dict with "labels", or an iterable of batches that gives the same
            batches each time it is read. x may be a tensor, a tuple (`model(*x)`) or a dict
            (`model(**x)`).
        params: which parameters, in the model's order; default all. Names, tensors, a module of
            the model, a regular expression for whole names, or a function (name, tensor) -> bool.
        reduction: "mean" (batches weighted by what their mean is over, which is measured where the
            loss is not one of torch's; see `fast.curvature.Loss`) or "sum" (batch losses added up;
            torch's losses are then sums themselves).
        method: "folded" pushes all vectors through a record of the gradient at once, "loop"
            differentiates the kept graph once per vector. "auto" takes the first where every
            operation of the network has a rule; `explain()` tells which. A rule that fails is a
            RuntimeWarning, and the loop takes over.
        chunk: vectors per pass of "folded"; "auto" derives it from `memory_budget`.
        memory_budget: bytes for their tangents; default 1 GiB, on a GPU a quarter of what is free.
        cache: keep what the products of a single batch share (activations, the record) from one
            product to the next, until parameters, buffers, data or the make-up of the modules
            (parts, modes, hooks, plain attributes) change. What a function or an object that is no
            module reads is not seen: call `refresh()` after changing that.
        compile: hand the code of passes (that of a batch which is kept comes with its 8th product)
            to torch's inductor. It needs a C++ compiler on a CPU, takes minutes, and has not paid
            on any CPU so far (docs/curvature.md).
        gemm: arithmetic of float32 matrix products and convolutions. None leaves it to torch's
            settings; on a GPU, "float32" and "tf32" set those, and put them back. "bfloat16" rounds
            the factors of products with vectors, and the results, in the "folded" method only.
        process_group: each rank holds its own part of the data (and the same model); all ranks make
            the same calls with the same vectors, and get the same product over all data by one
            all-reduce (`torch.distributed.group.WORLD` for all ranks).
        seed: seed of dropout masks, which are the same at every product, and of sampled labels.

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
        compile: bool = False,
        gemm: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ):
        self.settings = Settings(
            reduction=reduction,
            method=method,
            chunk=chunk,
            memory_budget=memory_budget,
            cache=cache,
            compile=compile,
            gemm=gemm,
            process_group=process_group,
            seed=seed,
        )
        self.loss_fn = loss_fn
        loss = self.loss  # an unknown one is refused here, not at a product
        ranks = 1 if process_group is None else dist.get_world_size(process_group)
        if loss.is_measured and ranks > 1:
            raise ValueError(
                "loss_fn in a process group: what its mean divides by is measured against the "
                "first batch, which each rank has another of. Give it, fast.curvature.Loss("
                "loss_fn, denominator=lambda output, target: ...), or reduction='sum'"
            )
        self.data = data if isinstance(data, Batches) else Batches(data)
        self._use(Network(model, params, seed))

    @property
    def loss(self) -> Loss:
        """The loss as `loss_fn` is now: the weights of a loss module may be exchanged."""
        return recognise(self.loss_fn, self.settings.reduction)

    # All batches.

    def products(self, vectors: Blocks) -> Blocks:
        def products() -> Blocks:
            return self._mean(vectors, lambda part, v: part.products(v)).result(vectors)

        result = products()
        if _finite(result):
            return result
        if self.settings.method == "auto" and not self.why_loop:
            self._take_loop("the record gave NaN or infinity")
            result = products()
        if not _finite(result):
            raise self._not_finite(vectors)
        return result

    def quadratics(self, vectors: Blocks) -> Tensor:
        zeros = vectors[0].new_zeros(vectors[0].shape[0], dtype=torch.float64)
        if not len(zeros):
            return zeros
        (result,) = self._mean(vectors, lambda part, v: [part.quad(v)]).result([zeros])
        if not _finite([result]):
            raise self._not_finite(vectors)
        return result

    @torch.inference_mode(False)
    def _mean(
        self, vectors: Blocks, apply: Callable[[Linearization, Blocks], Blocks]
    ) -> WeightedMean:
        """The mean over batches of what `apply` makes of their linearisations."""
        vectors = [v.clone() if v.is_inference() else v for v in vectors]
        loss = self.loss
        mean = WeightedMean(self.settings.process_group)
        with backends(self.settings.gemm, self.device):
            for index, batch, part in self.linearizations(vectors[0].shape[0], loss):
                try:
                    value = apply(part, vectors)
                except Exception as error:
                    by_record = isinstance(part, Passes)
                    if self.settings.method != "auto" or not by_record:
                        raise
                    value = apply(self._loop(batch, index, loss), vectors)
                    self._fall_back(error)
                mean.add(value, part.weight, loss.reduction)
        return mean

    def _not_finite(self, vectors: Blocks) -> Exception:
        """The error that says why products with `vectors` are not finite."""
        if not _finite(vectors):
            return ValueError("V holds NaN or infinity: a product with it is not finite")
        if not _finite(self.network.selected(self.network.leaves())):
            return ValueError("a product is not finite: the parameters hold NaN or infinity")
        for index, batch in enumerate(self.data):
            batch = batch.to(self.device)
            part = self._loop(batch, index, self.loss)
            if not bool(part.answers[0].isfinite().all()):
                return ValueError(
                    f"a product is not finite: the network's output for batch {index} holds NaN or "
                    "infinity"
                )
            again = functools.partial(part.products, vectors)
            if (error := explain_not_finite(self.network, batch, index, again)) is not None:
                return error
        return ValueError(f"a product is not finite: it overflows {self.dtype}")

    def gradient(self) -> Tensor:
        """Gradient of the loss over all data, [P]."""
        return self.value_and_gradient()[1]

    @torch.inference_mode(False)
    def value_and_gradient(self) -> tuple[float, Tensor]:
        """The loss over all data, and its gradient, [P]."""
        loss = self.loss
        mean = WeightedMean(self.settings.process_group)
        for index, batch in enumerate(self.data):
            batch = batch.to(self.device)
            with self.network.scope(index, differentiable_twice=False):
                leaves = self.network.leaves()
                params = self.network.selected(leaves)
                z, y = self.network.answers(leaves, batch, loss)
                self.network.refuse_strays(z, leaves)
                self.network.refuse_penalty(loss, z, y)
                value = loss.value(z, y)
                grads = grad_or_none([value], params)
                weight = loss.weight(z.detach(), y, batch.size)
            rows = [
                torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)
            ]
            blocks = [value.detach()[None], *(g.detach()[None] for g in rows)]
            mean.add(blocks, weight, loss.reduction)
        zeros = self.space.zeros(1)
        total, *gradient = mean.result([zeros[0].new_zeros(1), *zeros])
        return float(total), self.space.join(gradient)[0]

    def answers(self) -> list[Answer]:
        """Output, target and number of samples of every batch."""
        network, loss, out = self.network, self.loss, []
        for index, batch in enumerate(self.data):
            batch = batch.to(self.device)
            with network.scope(index, differentiable_twice=True):
                z, y = network.answers(network.leaves(), batch, loss)
            out.append((z.detach(), y, batch.size))
        return out

    # Parts of the matrix, and checks of it.

    def blocks(self, by: str | Mapping[str, Params] = "layer") -> dict[str, Self]:
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
            group = name if by == "parameter" else name.rpartition(".")[0]
            groups.setdefault(group, []).append(name)
        return {name: self.block(names) for name, names in groups.items()}

    def block(self, params: Params) -> Self:
        """The principal block of some of the parameters, as an operator of its own."""
        return self._over(Network(self.network.model, params, self.settings.seed))

    def _over(self, network: Network) -> Self:
        other = copy.copy(self)
        other._use(network)
        return other

    def findings(self, v: Tensor, av: Tensor, rtol: float) -> list[Finding]:
        findings = [
            data_finding(self.data),
            dropout_finding(self.network),
            *denominator_findings(self.loss, self.answers()),
        ]
        limit = difference_tolerance(self.dtype, rtol)
        return [*findings, *difference_findings(lambda: self._difference_error(v, av), limit)]

    def _difference_error(self, v: Tensor, av: Tensor) -> float | None:
        """Relative error of A v against a central difference in float64, where there is one."""
        return None

    def _in_float64(self) -> Self:
        """The same matrix of a copy of the model in float64, by the loop."""
        model, data = in_float64(self.network.model, self.data)
        other = self._over(Network(model, self.space.names, self.settings.seed))
        other.data, other.settings = data, dataclasses.replace(self.settings, method="loop")
        return other

    def _direction(self, v: Tensor) -> dict[str, Tensor]:
        """A vector [P] by name of parameter, in float64."""
        blocks = self.space.split(v[None])
        return {n: b[0].double() for n, b in zip(self.space.names, blocks, strict=True)}


def _finite(blocks: Blocks) -> bool:
    """Whether all numbers are finite; the device is waited for only once."""
    # The 2-norm is ten times as fast on a CPU, but may overflow.
    return any(
        bool(torch.stack(torch._foreach_norm(blocks, order)).isfinite().all())
        for order in (2, math.inf)
    )
