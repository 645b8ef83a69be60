"""Products from the kept graph, one vector after the other: works wherever autograd does."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fast.curvature.blame import cut_off, explain_failure
from fast.curvature.data import Batch
from fast.curvature.losses import Loss, OutputHessian
from fast.curvature.network import Network
from fast.curvature.space import Blocks, dot

ONCE = "its backward is marked once_differentiable"
OutputCurvature = Callable[[Tensor, Batch], OutputHessian]


class GraphHessian:
    """Exact Hessian of one batch: the graph of its gradient, differentiated once per vector.

    About 2 gradients per vector; the memory is that of the graph and does not grow with K.
    """

    def __init__(self, network: Network, loss: Loss, batch: Batch, index: int):
        with network.scope(index, differentiable_twice=True):
            leaves = network.leaves()
            self.params = network.selected(leaves)
            z = network.outputs(leaves, batch.inputs)
            network.refuse_strays(z, leaves)
            value = loss.value(z, batch.target)
            self.weight = loss.weight(z.detach(), batch.target, batch.size)
            self.loss = value.detach()
            # What `cut_off` looks for is only made where the cotangent requires a gradient.
            one = torch.ones_like(value, requires_grad=True)
            self.grads = grad_or_none([value], self.params, [one], create_graph=True)
        self.explain = functools.partial(explain_failure, network, batch, index)
        if cut_off(self.grads):
            raise self.explain(ONCE)

    def quad(self, vectors: Blocks) -> Tensor:
        return dot(vectors, self.products(vectors))

    def products(self, vectors: Blocks) -> Blocks:
        pairs = [
            (g, v)
            for g, v in zip(self.grads, vectors, strict=True)
            if g is not None and g.requires_grad
        ]
        out = [torch.zeros_like(v) for v in vectors]
        for k in range(vectors[0].shape[0] if pairs else 0):
            try:
                rows = grad_or_none(
                    [g for g, _ in pairs], self.params, [v[k] for _, v in pairs], retain_graph=True
                )
            except RuntimeError as error:
                raise self.explain(str(error)) from error
            _write(out, k, rows)
        return out


class GraphGGN:
    """J^T S J of one batch, S the curvature at the output; J by differentiating u -> J^T u."""

    def __init__(
        self, network: Network, loss: Loss, batch: Batch, index: int, curvature: OutputCurvature
    ):
        with network.scope(index, differentiable_twice=True):
            leaves = network.leaves()
            self.params = network.selected(leaves)
            self.output = network.outputs(leaves, batch.inputs)
            network.refuse_strays(self.output, leaves)
            z = self.output.detach()
            self.curvature = curvature(z, batch)
            self.weight = loss.weight(z, batch.target, batch.size)
            # u -> J^T u has the same derivative everywhere, but not every operation has one at zero
            # (logcumsumexp takes the logarithm of its gradient).
            self.cotangent = torch.ones_like(self.output, requires_grad=True)
            self.pulled = grad_or_none(
                [self.output], self.params, [self.cotangent], create_graph=True
            )
        self.explain = functools.partial(explain_failure, network, batch, index)
        if cut_off(self.pulled):
            raise self.explain(ONCE)

    def jvp(self, vectors: Blocks) -> Tensor:
        """[K, *output]."""
        pairs = [(p, v) for p, v in zip(self.pulled, vectors, strict=True) if p is not None]
        num_vectors = vectors[0].shape[0]
        out = self.output.new_zeros((num_vectors, *self.output.shape))
        for k in range(num_vectors if pairs else 0):
            try:
                (u,) = grad_or_none(
                    [p for p, _ in pairs],
                    [self.cotangent],
                    [v[k] for _, v in pairs],
                    retain_graph=True,
                )
            except RuntimeError as error:
                raise self.explain(str(error)) from error
            if u is not None:
                out[k] = u
        return out

    def vjp(self, cotangents: Tensor) -> Blocks:
        """[K, *output] -> one [K, *shape] per parameter."""
        num_vectors = cotangents.shape[0]
        out = [p.new_zeros((num_vectors, *p.shape)) for p in self.params]
        for k in range(num_vectors if self.output.requires_grad else 0):
            _write(
                out, k, grad_or_none([self.output], self.params, [cotangents[k]], retain_graph=True)
            )
        return out

    def products(self, vectors: Blocks) -> Blocks:
        return self.vjp(self.curvature.product(self.jvp(vectors)))

    def quad(self, vectors: Blocks) -> Tensor:
        # (J v)^T S (J v): the half that pulls back to the parameters is not needed.
        return self.curvature.quad(self.jvp(vectors))


def grad_or_none(
    outputs: list[Tensor],
    inputs: list[Tensor],
    cotangents: list[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """torch.autograd.grad, with None for inputs that the outputs do not depend on."""
    if not any(o.requires_grad for o in outputs):
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    )


def _write(out: Blocks, k: int, rows: list[Tensor | None]) -> None:
    for o, r in zip(out, rows, strict=True):
        if r is not None:
            o[k] = r
