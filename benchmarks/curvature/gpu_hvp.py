"""Curvature products on a GPU: shapes of known networks beside every peer, the op's bandwidth.

    python -m benchmarks.curvature.gpu_hvp [--cases vit_s vit_b bert_base resnet50 head] [--tf32]

Products are counted in gradients of the same batch, timed beside them in every round, in float32,
for K = 1, 8 and 32; `--tf32` lets the matrix products of all methods use it. `--cases` without a
name measures the op alone, `--methods` and `--compiled` choose what takes part. Memory is what
torch's allocator held at most, above what was there before. Every method's product is compared in
float64 first. The op is measured in GB/s beside a plain copy, each byte counted once. `resnet50`
needs torchvision.
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
from torch import Tensor, nn

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
from benchmarks.curvature.networks import MiniLM, Problem, ViT
from fast.curvature import GGN, Hessian
from fastkernels import cross_entropy_hvp_, cross_entropy_quad

COUNTS = (1, 8, 32)
# Timed at 32 vectors too, where a loop would repeat 8 four times.
MANY = ("fast", "vmap(jvp(grad))", "vmap(jvp, vjp)", "compiled vmap(jvp(grad))", "curvlinops")
# Rows and classes of the op, and its dtype.
ROWS = [
    (16384, 1000, torch.float32), (16384, 1000, torch.bfloat16),
    (65536, 100, torch.float32), (65536, 100, torch.bfloat16),
    (4096, 16384, torch.float32), (4096, 32000, torch.float32), (2048, 128256, torch.bfloat16),
]  # fmt: skip


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50  # type: ignore[import-untyped,unused-ignore]

    model: nn.Module = resnet50(weights=None)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which other libraries cannot differentiate twice
    return model


def _tokens(batch: int, length: int) -> Tensor:
    """Ids and a mask that pads nothing, [batch, 2, length]."""
    ids = torch.randint(1, MiniLM.vocabulary, (batch, length))
    return torch.stack([ids, torch.ones_like(ids)], 1)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], int]  # network, inputs, classes


def _pixels(batch: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, *shape)


CASES: dict[str, Case] = {
    "vit_s": (lambda: ViT(384, 12, 196, 768, 1000), _pixels(32, 196, 768), 1000),
    "resnet50": (_resnet50, _pixels(16, 3, 224, 224), 1000),
    "bert_base": (lambda: MiniLM(768, 12), lambda: _tokens(16, 128), 2),
    "vit_b": (lambda: ViT(768, 12, 196, 768, 1000), _pixels(16, 196, 768), 1000),
    "head": (lambda: nn.Sequential(nn.Linear(768, 1000)), _pixels(4096, 768), 1000),
}
# The same classes of networks, for a dry run.
TINY: dict[str, Case] = {
    "vit_s": (lambda: ViT(64, 1, 4, 6, 10), _pixels(3, 4, 6), 10),
    "resnet50": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(),
                                       nn.Linear(144, 10)), _pixels(3, 3, 8, 8), 10),
    "bert_base": (lambda: MiniLM(24, 1), lambda: _tokens(2, 5), 2),
    "vit_b": (lambda: ViT(64, 2, 4, 6, 10), _pixels(3, 4, 6), 10),
    "head": (lambda: nn.Sequential(nn.Linear(6, 10)), _pixels(8, 6), 10),
}  # fmt: skip


def build(case: str) -> Problem:
    torch.manual_seed(0)
    dry = gpu.device() == "cpu"
    network, inputs, classes = (TINY if dry else CASES)[case]
    model, x = network(), inputs()
    y = torch.randint(0, classes, (len(x),))
    return model.to(gpu.device()).eval(), x.to(gpu.device()), y.to(gpu.device())


def relative_error(problem: Problem, kind: str, method: str) -> float:
    """The error of two products in float64 on two samples, against the looped products."""
    model, x, y = problem
    model, x, y = copy.deepcopy(model).double(), x[:2], y[:2]
    x = x.double() if x.is_floating_point() else x
    vectors = probes(model, 2)
    operator = {"hessian": Hessian, "ggn": GGN}[kind](model, F.cross_entropy, (x, y), method="loop")
    return difference(METHODS[kind][method](model, x, y, vectors)(), operator @ vectors)


def seconds(run: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if gpu.device() == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure(problem: Problem, kind: str, method: str, count: int, rounds: int) -> Record:
    """Median gradients per product, their range, and the peak of memory in MiB."""
    model, x, y = problem
    vectors = probes(model, count)
    products, one_gradient = METHODS[kind][method](model, x, y, vectors), gradient(model, x, y)
    seconds(one_gradient)
    torch.cuda.empty_cache()
    peak = 0.0
    if on_gpu := gpu.device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    first = seconds(products)
    if on_gpu:
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


def products(
    case: str, chosen: list[str], compiled: bool, rounds: int, keep: Callable[[Record], None]
) -> None:
    """Hand every row to `keep` as it comes. Compiling takes minutes on deep networks."""
    problem = build(case)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    for kind, methods in METHODS.items():
        for method in methods:
            left_out = method not in chosen or (method.startswith("compiled") and not compiled)
            if left_out or missing(method):
                continue
            row: Record = {"case": case, "kind": kind, "method": method, "tf32": tf32}
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
    device = gpu.device()
    for n, c, dtype in ROWS:
        n = 3 if device == "cpu" else n
        p = torch.softmax(torch.randn(n, c, device=device), 1).to(dtype)
        scale = torch.full((n,), 1 / n, device=device, dtype=dtype)
        for count in (1, 8):
            u = torch.randn(count, n, c, device=device, dtype=dtype)
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
    names = list(dict.fromkeys(name for methods in METHODS.values() for name in methods))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--compiled", nargs="*", choices=CASES, default=["head"])
    parser.add_argument("--no-op", action="store_true", help="leave out the op")
    parser.add_argument("--tf32", action="store_true")
    args = gpu.parse(parser)
    # Peers cannot differentiate the fused encoder layer that torch takes without gradients.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    copy_rate = gpu.copy_bandwidth(20)
    report = gpu.where() | {
        "copy_gb_per_s": copy_rate,
        "gemm_gflops": gemm_rate(gpu.device()) / 1e9,
        "op": [] if args.no_op else bandwidth(20, copy_rate),
        "products": [],
    }

    def keep(row: Record) -> None:
        report["products"].append(row)
        gpu.write(report, args.output)

    gpu.write(report, args.output)
    for case in args.cases:
        products(case, args.methods, case in args.compiled, args.rounds, keep)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
