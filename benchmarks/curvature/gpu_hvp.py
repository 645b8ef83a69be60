"""Curvature products on a GPU: ViT-S and ResNet-50 shapes beside every peer, the op's bandwidth.

    python -m benchmarks.curvature.gpu_hvp [--cases vit_s resnet50 head]

Products are counted in gradients of the same batch, timed beside them in every round, in float32
without TF32, for K = 1, 8 and 32. Memory is what torch's allocator held at most, above what was
there before. Every method's product is compared in float64 first. The op is measured in GB/s
beside a plain copy, each byte counted once. `resnet50` needs torchvision.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import gpu
from benchmarks.common import Record
from benchmarks.curvature.floor import gemm_rate
from benchmarks.curvature.methods import (
    EXACT,
    METHODS,
    difference,
    gradient,
    missing,
    probes,
)
from benchmarks.curvature.networks import Problem, ViT
from fast.curvature import GGN, Hessian
from fastkernels import cross_entropy_hvp_, cross_entropy_quad

COUNTS = (1, 8, 32)
# Compiling takes minutes on networks of this depth.
COMPILED = ("head",)
# Timed at 32 vectors as well: a loop would repeat 8 four times, and vmap takes 8 GiB a vector.
MANY = ("fast",)
# Rows and classes of the op, and its dtype.
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
    """The error of two products in float64 on two samples, against the looped products."""
    model, x, y = problem
    model, x, y = copy.deepcopy(model).double(), x[:2].double(), y[:2]
    vectors = probes(model, 2)
    operator = {"hessian": Hessian, "ggn": GGN}[kind](model, F.cross_entropy, (x, y), method="loop")
    return difference(METHODS[kind][method](model, x, y, vectors)(), operator @ vectors)


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(problem: Problem, kind: str, method: str, count: int, rounds: int) -> Record:
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
        # Five gradients, because one is shorter than what the host needs to launch it.
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


def products(case: str, rounds: int, keep: Callable[[Record], None]) -> None:
    """Hand every row to `keep` as it comes."""
    problem = build(case)
    for kind, methods in METHODS.items():
        for method in methods:
            if missing(method) or (method.startswith("compiled") and case not in COMPILED):
                continue
            row: Record = {"case": case, "kind": kind, "method": method}
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


def bandwidth(rounds: int, copy_rate: float) -> list[Record]:
    """`cross_entropy_hvp_` and `cross_entropy_quad` for 1 and 8 vectors."""
    rows = []
    for n, c, dtype in ROWS:
        p = torch.softmax(torch.randn(n, c, device="cuda"), 1).to(dtype)
        scale = torch.full((n,), 1 / n, device="cuda", dtype=dtype)
        for count in (1, 8):
            u = torch.randn(count, n, c, device="cuda", dtype=dtype)
            ops = {"hvp": cross_entropy_hvp_, "quad": cross_entropy_quad}
            steps = {
                name: gpu.graphed(functools.partial(op, u, p, scale)) for name, op in ops.items()
            }
            for op, ms in gpu.interleaved(steps, rounds).items():
                size = ((2 if op == "hvp" else 1) * count + 1) * p.nbytes
                rate = size / ms / 1e6
                row: Record = {"op": op, "rows": n, "classes": c, "dtype": str(dtype)}
                row |= {"count": count, "ms": ms, "gb_per_s": rate, "of_copy": rate / copy_rate}
                rows.append(row)
                print(f"{op:5} [{count}, {n}, {c}] {dtype}: {ms:.3f} ms, {rate:.0f} GB/s, "
                      f"{rate / copy_rate:.1%} of copy", flush=True)  # fmt: skip
            del u, steps
    return rows


def main() -> None:
    parser = gpu.arguments(__doc__, rounds=5, output="gpu_hvp.json")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    gpu.need_cuda()
    torch.backends.cudnn.allow_tf32 = False
    copy_rate = gpu.copy_bandwidth(20)
    report = gpu.where() | {
        "copy_gb_per_s": copy_rate,
        "gemm_gflops": gemm_rate("cuda") / 1e9,
        "op": bandwidth(20, copy_rate),
        "products": [],
    }

    def keep(row: Record) -> None:
        report["products"].append(row)
        gpu.write(report, args.output)

    gpu.write(report, args.output)
    for case in args.cases:
        products(case, args.rounds, keep)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
