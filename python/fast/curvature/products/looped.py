"""Products by autograd from a graph that is kept, one vector after the other.

This works wherever autograd does.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fast.curvature.network.double_backward import explain_failure
from fast.curvature.network.graph import cut_off
from fast.curvature.network.parameter_space import Blocks, dot
from fast.curvature.products.batch_loss import BatchLoss

ONCE = "its backward is marked once_differentiable"


class GraphHessian:
    """Exact Hessian of one batch: the graph of its gradient, differentiated once per vector.

    A vector costs about 2 gradients; the memory is that of the graph and does not grow with K.
    """

    def __init__(self, of: BatchLoss):
        with of.scope(differentiable_twice=True):
            leaves = of.network.leaves()
            self.params = of.network.selected(leaves)
            z, y = of.answers(leaves)
            of.network.refuse_strays(z, leaves)
            value = of.loss.value(z, y)
            self.answers, self.weight = (z.detach(), y), 0.0
            self.loss = value.detach()
            # The nodes that `cut_off` looks for exist only where the cotangent requires a gradient.
            one = torch.ones_like(value, requires_grad=True)
            self.grads = grad_or_none([value], self.params, [one], create_graph=True)
        # Makes the error that names the module at fault.
        self.explain = functools.partial(explain_failure, of.network, of.batch, of.index)
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
    """J^T S J of one batch, with J the Jacobian and S the curvature at the output.

    J v is computed by differentiating u -> J^T u where the network can be differentiated twice,
    else in forward mode, and where that fails too, row by row.
    """

    def __init__(self, of: BatchLoss):
        self.of = of
        leaves = of.network.leaves()
        self.params = of.network.selected(leaves)
        with of.scope(differentiable_twice=True):
            self.output, y = of.answers(leaves)
        of.network.refuse_strays(self.output, leaves)
        with of.scope(differentiable_twice=True):
            z = self.output.detach()
            self.curvature = of.curvature(of.loss, z, y)
            self.answers, self.weight = (z, y), 0.0
            # u -> J^T u has the same derivative everywhere, but not every operation has one at zero
            # (logcumsumexp takes the logarithm of its gradient).
            self.cotangent = torch.ones_like(self.output, requires_grad=True)
            self.pullback = grad_or_none(
                [self.output], self.params, [self.cotangent], create_graph=True
            )
        # The ways to J v that have not failed yet, the fastest first.
        self.ways = [self._twice, self._forward_mode, self._by_rows]
        if cut_off(self.pullback):
            self.ways.remove(self._twice)

    def jvp(self, vectors: Blocks) -> Tensor:
        """J v of every vector, [K, *output]."""
        while len(self.ways) > 1:
            try:
                tangents = self.ways[0](vectors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation that has no such derivative
                del self.ways[0]
                continue
            # Where torch masks a NaN in its derivative, it does not in that of the derivative.
            if bool(tangents.isfinite().all()):
                return tangents
            del self.ways[0]
        return self.ways[0](vectors)

    def _twice(self, vectors: Blocks) -> Tensor:
        """J v as the derivative of u -> J^T u, one vector after the other."""
        pairs = [(p, v) for p, v in zip(self.pullback, vectors, strict=True) if p is not None]
        num_vectors = vectors[0].shape[0]
        out = self.output.new_zeros((num_vectors, *self.output.shape))
        for k in range(num_vectors if pairs else 0):
            (u,) = grad_or_none(
                [p for p, _ in pairs], [self.cotangent], [v[k] for _, v in pairs], retain_graph=True
            )
            if u is not None:
                out[k] = u
        return out

    def _forward_mode(self, vectors: Blocks) -> Tensor:
        """J v by forward mode: the network is evaluated once per vector."""
        network, rows = self.of.network, []
        for tangents in zip(*vectors, strict=True):
            with _dual_level(), torch.no_grad():
                leaves = {n: p.detach() for n, p in network.leaves().items()}
                for name, v in zip(network.names, tangents, strict=True):
                    leaves[name] = forward_ad.make_dual(leaves[name], v)
                with self.of.scope(differentiable_twice=True):
                    u = forward_ad.unpack_dual(self.of.answers(leaves)[0]).tangent
            rows.append(torch.zeros_like(self.output) if u is None else u)
        return torch.stack(rows)

    def _by_rows(self, vectors: Blocks) -> Tensor:
        """J v for all vectors together, at one gradient for each entry of the output."""
        entries = self.output.reshape(-1)
        out = entries.new_zeros((vectors[0].shape[0], len(entries)))
        for i, entry in enumerate(entries if entries.requires_grad else ()):
            for v, r in zip(
                vectors, grad_or_none([entry], self.params, retain_graph=True), strict=True
            ):
                if r is not None:
                    out[:, i] += v.flatten(1) @ r.flatten()
        return out.view(-1, *self.output.shape)

    def vjp(self, cotangents: Tensor) -> Blocks:
        """J^T u of every cotangent u, [K, *output]: one [K, *shape] per parameter."""
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
        # This is (J v)^T S (J v): nothing has to be pulled back to the parameters.
        return self.curvature.quad(self.jvp(vectors))


@contextlib.contextmanager
def _dual_level() -> Iterator[None]:
    """Forward mode, without the warnings of its first use in a process."""
    with forward_ad.dual_level():
        with warnings.catch_warnings():
            # The first dual number of a process compiles scripts of torch that raise warnings.
            warnings.simplefilter("ignore", DeprecationWarning)
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
        yield


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
    """Write the rows of vector k; where one is None, zeros are there already."""
    for o, r in zip(out, rows, strict=True):
        if r is not None:
            o[k] = r
