"""Ways to multiply with a curvature matrix; each is checked before it is timed."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature import peers
from benchmarks.curvature.networks import build
from fast.curvature import GGN, Hessian

# A Jacobian with more rows is not written out row by row.
MOST_ROWS = 128
# The relative error of an exact product in float64 is below this.
EXACT = 1e-8
Vectors = dict[str, Tensor]  # name -> [K, *shape]


def probes(model: nn.Module, count: int) -> Vectors:
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(count, *p.shape, generator=generator).to(p)
        for n, p in model.named_parameters()
    }


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    params = list(model.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), params)


def _ours(kind: type[Hessian | GGN], method: str):
    def prepare(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
        # With cache=False, what the products share is computed, and counted, every time.
        operator = kind(model, F.cross_entropy, (x, y), method=method, cache=False)
        return lambda: operator @ vectors

    return prepare


def _kept_graph(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
    """Double backward in a loop, as a careful person writes it today."""
    params = list(model.parameters())

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model(x), y)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            count = len(next(iter(vectors.values())))
            rows = [
                torch.autograd.grad(
                    grads, params, [v[k] for v in vectors.values()], retain_graph=True
                )
                for k in range(count)
            ]
        return dict(zip(vectors, map(torch.stack, zip(*rows, strict=True)), strict=True))

    return run


def _vmap_hessian(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors, compiled: bool = False):
    params = {n: p.detach() for n, p in model.named_parameters()}
    first = grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))
    products = vmap(lambda v: jvp(first, (params,), (v,))[1])
    if compiled:
        products = torch.compile(products)

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            return products(vectors)

    return run


_compiled_hessian = functools.partial(_vmap_hessian, compiled=True)


def _vmap_ggn(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
    params = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(p: Vectors) -> Tensor:
        return functional_call(model, p, (x,))

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            z, pull = vjp(outputs, params)
            p = torch.softmax(z, -1)

            def product(v: Vectors) -> Vectors:
                u = jvp(outputs, (params,), (v,))[1]
                return pull(p * (u - (p * u).sum(-1, keepdim=True)) / len(x))[0]

            return vmap(product)(vectors)

    return run


def _explicit_ggn(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
    """J^T S J v by the rows of the Jacobian, one output after the other, in plain autograd."""
    params = list(model.parameters())

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            z = model(x)

        def rows():
            for entry in z.reshape(-1):
                yield torch.autograd.grad(
                    entry, params, retain_graph=True, allow_unused=True, materialize_grads=True
                )

        moved = [
            sum(v.flatten(1) @ g.flatten() for v, g in zip(vectors.values(), row, strict=True))
            for row in rows()
        ]
        u = torch.stack(moved, 1).view(-1, *z.shape)
        p = torch.softmax(z.detach(), -1)
        s = (p * (u - (p * u).sum(-1, keepdim=True)) / len(x)).flatten(1)
        out = {n: torch.zeros_like(v) for n, v in vectors.items()}
        for weights, row in zip(s.T, rows(), strict=True):
            for o, g in zip(out.values(), row, strict=True):
                o += weights.view(-1, *[1] * g.ndim) * g
        return out

    return run


METHODS = {
    "hessian": {
        "fast": _ours(Hessian, "auto"),
        "fast, loop": _ours(Hessian, "loop"),
        "kept-graph loop": _kept_graph,
        "vmap(jvp(grad))": _vmap_hessian,
        "compiled vmap(jvp(grad))": _compiled_hessian,
        "curvlinops": peers.curvlinops("Hessian"),
        "PyHessian": peers.pyhessian,
        "hessian-eigenthings": peers.eigenthings_hessian,
    },
    "ggn": {
        "fast": _ours(GGN, "auto"),
        "fast, loop": _ours(GGN, "loop"),
        "vmap(jvp, vjp)": _vmap_ggn,
        "curvlinops": peers.curvlinops("GGN"),
        "hessian-eigenthings": peers.eigenthings_ggn,
    },
}
MODULES = {
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "PyHessian": ("pyhessian", "PyHessian"),
    "hessian-eigenthings": ("hessian_eigenthings", "hessian-eigenthings"),
}


def missing(method: str) -> str:
    """Why a method cannot run here, or ""."""
    module, package = MODULES.get(method, ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return ""


@functools.cache
def relative_error(case: str, kind: str, method: str) -> float:
    """The error of two products in float64 on four samples, against plain autograd.

    The truth is the double backward, or J^T S J by the rows of J; with many outputs, by torch.func.
    """
    model, x, y = build(case)
    model, x, y = copy.deepcopy(model).double(), x[:4], y[:4]
    x = x.double() if x.is_floating_point() else x
    vectors = probes(model, 2)
    with torch.no_grad():
        many = model(x).numel() > MOST_ROWS
    truth_of = {"hessian": _kept_graph, "ggn": _vmap_ggn if many else _explicit_ggn}[kind]
    truth = truth_of(model, x, y, vectors)()
    return difference(METHODS[kind][method](model, x, y, vectors)(), truth)


def difference(product: Vectors, truth: Vectors) -> float:
    """The norm of the difference over the norm of the truth."""
    error = sum(float((product[n] - t).square().sum()) for n, t in truth.items())
    return (error / sum(float(t.square().sum()) for t in truth.values())) ** 0.5
