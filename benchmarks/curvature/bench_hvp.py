"""Products with K vectors, in gradients per product: time of all K over K times one gradient.

Every round times a gradient of the same batch beside the products, in the same process and in
processor seconds, so that the ratio survives a busy machine. `extra_info` has the ratio, its range,
the relative error in float64 and the least time that the arithmetic takes. `bench_memory` has the
peak memory, each method in a process of its own; it needs no quiet machine.

    pytest benchmarks/curvature/bench_hvp.py --benchmark -k "products and vit and ggn and 8"
    python -m benchmarks.report RESULT.json [RESULT.json ...] --targets

With FAST_DATA, the folder of `benchmarks/real_pairs.py`, MiniLM is the trained one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.curvature.floor import floor_seconds, gemm_rate
from benchmarks.curvature.methods import EXACT, METHODS, gradient, missing, probes, relative_error
from benchmarks.curvature.networks import CASES, build

ROOT = Path(__file__).parents[2]
ROUNDS = 3
LARGEST = {"mlp": 32, "head": 32, "resnet20": 8, "vit": 8, "minilm": 8}
LINEAR = ("mlp", "head")
Variant = tuple[str, str, str, int]


def variants(case: str, kind: str, method: str) -> Iterator[int]:
    """The K that a method is timed at."""
    if method in ("fast", "fast, loop", "kept-graph loop"):
        yield from {1, 8, LARGEST[case]}
        if case == "vit" and method == "fast":
            yield 32
    elif method.startswith("compiled"):
        if case in LINEAR:  # 134 s of compiling on ResNet-20
            yield LARGEST[case]
    elif case in LINEAR or (method == "PyHessian" and case == "resnet20"):
        yield LARGEST[case]
    else:
        yield 1  # vmap takes 0.4 to 1.4 GiB per vector


VARIANTS: list[Variant] = [
    (case, kind, method, count)
    for case in CASES
    for kind, methods in METHODS.items()
    for method in methods
    for count in sorted(set(variants(case, kind, method)))
]
MEMORY = [
    (case, kind, method, max(variants(case, kind, method)))
    for case in CASES
    for kind, methods in METHODS.items()
    for method in methods
    if any(variants(case, kind, method))
]


def name(value: object) -> str:
    return str(value).replace(" ", "-")


# Other libraries warn.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("case", "kind", "method", "count"), VARIANTS, ids=name)
def bench_products(benchmark, case: str, kind: str, method: str, count: int) -> None:
    if why := missing(method):
        pytest.skip(why)
    error = _error_or_skip(case, kind, method)
    model, x, y = build(case)
    vectors = probes(model, count)
    products, one_gradient = METHODS[kind][method](model, x, y, vectors), gradient(model, x, y)
    ratios, seconds = [], []
    rate = gemm_rate()
    one_gradient()

    def beside() -> None:
        start = time.process_time()
        one_gradient()
        seconds.append(time.process_time() - start)

    def timed() -> None:
        start = time.process_time()
        products()
        ratios.append((time.process_time() - start) / (count * seconds[-1]))

    benchmark.group = f"{case} {kind} K={count}"
    long = case == "vit" and count == 32
    warmups, rounds = (0, 1) if long else (1, ROUNDS)
    benchmark.pedantic(timed, setup=beside, rounds=rounds, warmup_rounds=warmups)
    ratios = ratios[warmups:]
    benchmark.extra_info |= {
        "case": case,
        "kind": kind,
        "method": method,
        "count": count,
        "gradients_per_product": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
        "gradient_ms": 1e3 * statistics.median(seconds),
        "relative_error": error,
        "wrong": error > EXACT,
        "gemm_gflops": rate / 1e9,
        "floor_ms": 1e3 * floor_seconds(case, kind, count, rate),
    }
    if method.startswith("fast"):
        assert error < EXACT


def _error_or_skip(case: str, kind: str, method: str) -> float:
    try:
        return relative_error(case, kind, method)
    except Exception as error:
        if method.startswith("fast"):
            raise
        pytest.skip(f"{method} fails on {case}: {type(error).__name__}: {str(error)[:160]}")


@pytest.mark.parametrize(("case", "kind", "method", "count"), MEMORY, ids=name)
def bench_memory(benchmark, case: str, kind: str, method: str, count: int) -> None:
    """Peak of one call, above what is resident after a gradient, in a process of its own."""
    if why := missing(method):
        pytest.skip(why)
    command = [sys.executable, "-m", "benchmarks.curvature.memory", case, kind, method, str(count)]

    def measure() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    benchmark.group = f"memory: {case} {kind} K={count}"
    done = benchmark.pedantic(measure, rounds=1)
    if done.returncode and not method.startswith("fast"):
        pytest.skip(f"{method} fails on {case}: {done.stderr.strip().splitlines()[-1][:160]}")
    assert not done.returncode, done.stderr
    benchmark.extra_info |= {"case": case, "kind": kind, "method": method, "count": count}
    benchmark.extra_info |= json.loads(done.stdout)
