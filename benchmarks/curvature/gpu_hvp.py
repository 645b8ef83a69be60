"""Curvature products on a GPU: ViT-S and ResNet-50 shapes beside every peer, the op's bandwidth.

    python benchmarks/gpu_hvp.py [--rounds 5] [--cases vit_s resnet50 head] [--output FILE]

Unit of the products: gradients of the same batch, timed beside them in every round; float32
without TF32, K = 1, 8 and 32. Memory is what torch's allocator held at most, above what was there
before. Every method's product is compared in float64 first. Of the op: GB/s, bytes counted once
each, beside a plain copy. `resnet50` needs torchvision.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS
from benchmarks.curvature.floor import gemm_rate
from benchmarks.curvature.methods import METHODS, gradient, missing, probes
from benchmarks.curvature.networks import ViT
from benchmarks.kernels.gpu_update import copy_bandwidth, graphed, interleaved, where
from fast.curvature import GGN, Hessian
from fastkernels import cross_entropy_hvp_, cross_entropy_quad

Problem = tuple[nn.Module, Tensor, Tensor]
COUNTS = (1, 8, 32)
EXACT = 1e-8
# Compiling takes minutes on networks of this depth.
COMPILED = ("head",)
# 32 vectors: of a loop they are 8 four times over, and vmap takes 8 GiB a vector.
MANY = ("fast",)
# [rows, classes] of the op, and its dtype.
ROWS = [
    (16384, 1000, torch.float32), (16384, 1000, torch.bfloat16), (65536, 100, torch.float32),
    (4096, 16384, torch.float32), (4096, 32000, torch.float32), (2048, 128256, torch.bfloat16),
]  # fmt: skip


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50  # type: ignore[import-untyped,unused-ignore]

    model: nn.Module = resnet50(weights=None)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which other libraries cannot differentiate twice
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "vit_s": (lambda: ViT(384, 12, 196, 768, 1000), (196, 768), 32),
    "resnet50": (_resnet50, (3, 224, 224), 16),
    "head": (lambda: nn.Sequential(nn.Linear(768, 1000)), (768,), 4096),
}


def build(case: str) -> Problem:
    torch.manual_seed(0)
    network, shape, batch = CASES[case]
    model, x, y = network(), torch.randn(batch, *shape), torch.randint(0, 1000, (batch,))
    return model.cuda().eval(), x.cuda(), y.cuda()


def relative_error(problem: Problem, kind: str, method: str) -> float:
    """Of two products in float64 on two samples, against the kept graph or its GGN."""
    model, x, y = problem
    model, x, y = copy.deepcopy(model).double(), x[:2].double(), y[:2]
    vectors = probes(model, 2)
    loop = {"hessian": Hessian, "ggn": GGN}[kind](model, F.cross_entropy, (x, y), method="loop")
    truth = loop @ vectors
    product = METHODS[kind][method](model, x, y, vectors)()
    error = sum(float((product[n] - t).square().sum()) for n, t in truth.items())
    return (error / sum(float(t.square().sum()) for t in truth.values())) ** 0.5


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(problem: Problem, kind: str, method: str, count: int, rounds: int) -> dict[str, Any]:
    """Median gradients per product, their range, and the peak of memory in MiB."""
    model, x, y = problem
    vectors = probes(model, count)
    products, one_gradient = METHODS[kind][method](model, x, y, vectors), gradient(model, x, y)
    seconds(one_gradient)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = seconds(products)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    gradients, times = [], []
    for _ in range(rounds if first < 1 else 2):
        # Several gradients: one is shorter than what the host needs to launch it.
        gradients.append(seconds(lambda: [one_gradient() for _ in range(5)]) / 5)
        times.append(seconds(products))
    ratios = [t / (count * g) for t, g in zip(times, gradients, strict=True)]
    return {
        "gradients_per_product": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
        "ms": 1e3 * statistics.median(times),
        "gradient_ms": 1e3 * statistics.median(gradients),
        "peak_mib": peak,
    }


def products(case: str, rounds: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Hand every row to `keep` as it comes."""
    problem = build(case)
    for kind, methods in METHODS.items():
        for method in methods:
            if missing(method) or (method.startswith("compiled") and case not in COMPILED):
                continue
            row = {"case": case, "kind": kind, "method": method}
            try:
                error = relative_error(problem, kind, method)
                counts = COUNTS if method in MANY or case == "head" else COUNTS[:2]
                for count in counts:
                    row |= {"count": count, "relative_error": error, "wrong": error > EXACT}
                    row |= measure(problem, kind, method, count, rounds)
                    keep(dict(row))
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()
                           if k not in ("range", "gradient_ms")}, error, flush=True)  # fmt: skip
            except Exception as failure:  # noqa: BLE001 - a peer that fails is a row of the table
                said = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
                keep(row | {"failed": said})
                print(case, kind, method, said, flush=True)
            gc.collect()
            torch.cuda.empty_cache()


def bandwidth(rounds: int, copy_rate: float) -> list[dict[str, Any]]:
    """`cross_entropy_hvp_` and `cross_entropy_quad` for 1 and 8 vectors."""
    rows = []
    for n, c, dtype in ROWS:
        p = torch.softmax(torch.randn(n, c, device="cuda"), 1).to(dtype)
        scale = torch.full((n,), 1 / n, device="cuda", dtype=dtype)
        for count in (1, 8):
            u = torch.randn(count, n, c, device="cuda", dtype=dtype)
            ops = {"hvp": cross_entropy_hvp_, "quad": cross_entropy_quad}
            steps = {name: graphed(functools.partial(op, u, p, scale)) for name, op in ops.items()}
            for op, ms in interleaved(steps, rounds).items():
                size = ((2 if op == "hvp" else 1) * count + 1) * p.nbytes
                rate = size / ms / 1e6
                row: dict[str, Any] = {"op": op, "rows": n, "classes": c, "dtype": str(dtype)}
                row |= {"count": count, "ms": ms, "gb_per_s": rate, "of_copy": rate / copy_rate}
                rows.append(row)
                print(f"{op:5} [{count}, {n}, {c}] {dtype}: {ms:.3f} ms, {rate:.0f} GB/s, "
                      f"{rate / copy_rate:.1%} of copy", flush=True)  # fmt: skip
            del u, steps, ops
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_hvp.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_hvp.py needs a CUDA device; torch finds none")
    torch.backends.cudnn.allow_tf32 = False
    copy_rate = copy_bandwidth(20)
    report = where() | {
        "copy_gb_per_s": copy_rate,
        "gemm_gflops": gemm_rate("cuda") / 1e9,
        "op": bandwidth(20, copy_rate),
        "products": [],
    }

    def keep(row: dict[str, Any]) -> None:
        report["products"].append(row)
        options.output.write_text(json.dumps(report, indent=1) + "\n")

    options.output.write_text(json.dumps(report, indent=1) + "\n")
    for case in options.cases:
        products(case, options.rounds, keep)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
