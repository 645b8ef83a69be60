"""Products with K vectors, in gradients per product: time of all K over K times one gradient.

Every round times a gradient of the same batch beside the products, in the same process, so the
ratio survives a busy machine better than the seconds do. `extra_info` has the ratio, its range, the
relative error in float64 and the peak memory of a process of its own.

    pytest benchmarks/bench_hvp.py --benchmark -k "vit and ggn and 8"
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvp_cases import CASES, METHODS, build, gradient, probes, relative_error

ROUNDS = 3
# vmap takes 0.4 to 1.4 GiB per vector on the networks with large activations: one vector only.
VARIANTS = [
    (case, kind, method, count)
    for case in CASES
    for kind, methods in METHODS.items()
    for method in methods
    for count in (1, 8, 32)
    if not (case in ("resnet20", "vit") and count == 32)
    and not ("vmap" in method and case in ("resnet20", "vit") and count > 1)
]


@pytest.mark.parametrize(
    ("case", "kind", "method", "count"), VARIANTS, ids=lambda v: str(v).replace(" ", "-")
)
def bench_products(benchmark, case: str, kind: str, method: str, count: int) -> None:
    if method == "curvlinops" and importlib.util.find_spec("curvlinops") is None:
        pytest.skip("curvlinops is not installed: pip install curvlinops-for-pytorch")
    error = relative_error(case, kind, method)
    model, x, y = build(case)
    vectors = probes(model, count)
    products, one_gradient = METHODS[kind][method](model, x, y, vectors), gradient(model, x, y)
    ratios, seconds = [], []

    def beside() -> None:
        start = time.perf_counter()
        one_gradient()
        seconds.append(time.perf_counter() - start)

    def timed() -> None:
        start = time.perf_counter()
        products()
        ratios.append((time.perf_counter() - start) / (count * seconds[-1]))

    benchmark.group = f"{case} {kind} K={count}"
    benchmark.pedantic(timed, setup=beside, rounds=ROUNDS, warmup_rounds=1)
    ratios = ratios[1:]
    benchmark.extra_info |= {
        "gradients_per_product": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
        "gradient_ms": 1e3 * statistics.median(seconds),
        "relative_error": error,
        "wrong": error > 1e-8,
        "peak_mib": peak_mib(case, kind, method, count),
    }
    if method.startswith("fast"):
        assert error < 1e-8


def peak_mib(case: str, kind: str, method: str, count: int) -> float:
    """Of one call, above what is resident after a gradient, in a process of its own."""
    script = Path(__file__).with_name("hvp_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), case, kind, method, str(count)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)["peak_mib"]
