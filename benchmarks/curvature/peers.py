"""Products of the other libraries that are installed.

Attention is computed by plain matrix products: none of them can differentiate the fused one twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Vectors = dict[str, Tensor]  # name -> [K, *shape]
Prepare = Callable[[nn.Module, Tensor, Tensor, Vectors], Callable[[], Vectors]]


def curvlinops(kind: str) -> Prepare:
    def prepare(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors) -> Callable[[], Vectors]:
        import curvlinops

        operator = getattr(curvlinops, f"{kind}LinearOperator")(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)],
            check_deterministic=False,
        )  # fmt: skip
        stacked = [v.movedim(0, -1).contiguous() for v in vectors.values()]

        def run() -> Vectors:
            with sdpa_kernel(SDPBackend.MATH):
                out = operator @ stacked
            return {n: o.movedim(-1, 0) for n, o in zip(vectors, out, strict=True)}

        return run

    return prepare


def pyhessian(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors) -> Callable[[], Vectors]:
    import pyhessian
    from pyhessian.utils import hessian_vector_product

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            h = pyhessian.hessian(model, F.cross_entropy, data=(x, y), cuda=x.is_cuda)
            count = len(next(iter(vectors.values())))
            rows = [
                hessian_vector_product(h.gradsH, h.params, [v[k] for v in vectors.values()])
                for k in range(count)
            ]
        model.zero_grad()  # it leaves its gradients, with their graph, in .grad
        return dict(zip(vectors, map(torch.stack, zip(*rows, strict=True)), strict=True))

    return run


def eigenthings_hessian(
    model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors
) -> Callable[[], Vectors]:
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator

    return _one_by_one(
        HessianOperator(model, [(x, y)], supervised_loss(F.cross_entropy)), model, vectors
    )


def eigenthings_ggn(
    model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors
) -> Callable[[], Vectors]:
    from hessian_eigenthings.loss_fns.standard import (
        supervised_forward,
        supervised_loss_of_output,
    )
    from hessian_eigenthings.operators import GGNOperator

    loss = supervised_loss_of_output(F.cross_entropy)
    return _one_by_one(GGNOperator(model, [(x, y)], supervised_forward, loss), model, vectors)


def _one_by_one(
    operator: Callable[[Tensor], Tensor], model: nn.Module, vectors: Vectors
) -> Callable[[], Vectors]:
    flat = torch.cat([v.flatten(1) for v in vectors.values()], 1)
    sizes = [v[0].numel() for v in vectors.values()]

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            rows = torch.stack([operator(v) for v in flat])
        model.zero_grad()
        parts = zip(vectors.items(), rows.split(sizes, 1), strict=True)
        return {n: part.reshape(v.shape) for (n, v), part in parts}

    return run
