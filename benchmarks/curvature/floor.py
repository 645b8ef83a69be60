"""The least time of K products: the arithmetic that all of them need, at the rate of a plain GEMM.

The arithmetic is counted, not modelled. K exact products need one gradient and K times what a
second derivative adds to it; K Gauss-Newton products need one forward pass and K times one tangent
and one backward pass.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.curvature.methods import METHODS, gradient, probes
from benchmarks.curvature.networks import build
from fast.curvature.products.rules import gemm

SAMPLES = 4  # counted on a part of the batch, with which all of this arithmetic grows


def _count(run: Callable[[], object]) -> int:
    # The counter does not see into the CPU's fused attention and encoder layers.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


@functools.cache
def flops(case: str, kind: str) -> tuple[float, float]:
    """(what all products of a batch share, what each adds)."""
    model, x, y = build(case)
    scale = len(x) / SAMPLES
    x, y = x[:SAMPLES], y[:SAMPLES]
    method = {"hessian": "kept-graph loop", "ggn": "vmap(jvp, vjp)"}[kind]

    def products(count: int) -> int:
        return _count(METHODS[kind][method](model, x, y, probes(model, count)))

    # A linear network's Hessian needs its outputs alone.
    outputs_suffice = kind == "ggn" or case == "head"
    shared = _count((lambda: model(x)) if outputs_suffice else gradient(model, x, y))
    return scale * shared, scale * (products(2) - products(1))


def gemm_rate(device: torch.device | str = "cpu") -> float:
    """FLOP/s of a [4096, 1024] x [1024, 4096] product in float32, by the fastest library."""
    a, b = torch.randn(4096, 1024, device=device), torch.randn(1024, 4096, device=device)
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    best = 0.0
    for multiply in (torch.mm, gemm.mm):
        for _ in range(2):
            wait()
            start = time.perf_counter()
            multiply(a, b)
            wait()
            best = max(best, 2 * 4096 * 1024 * 4096 / (time.perf_counter() - start))
    return best


def floor_seconds(case: str, kind: str, count: int, rate: float) -> float:
    shared, each = flops(case, kind)
    return (shared + count * each) / rate
