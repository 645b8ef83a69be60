"""Are eigenvalues and trace of real networks' losses right, and how long do they take?

They are compared with scipy's, and the times with those of PyHessian and curvlinops where these are
installed.

    python -m benchmarks.curvature.agreement --data FOLDER [--samples 64] [--save NAME]

Every method gets the same batch, in float32 on one thread; times are processor time. A method's
time is that of its first run, over looser to tighter tolerances, that is accurate enough: the runs
before it, which a user would have to pay for as well, are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn

from benchmarks.common import Record, save, shown, table
from benchmarks.real_pairs import real_pair
from fast.curvature import Hessian, keep_freed_memory
from fast.data.trees import pick

NETWORKS = {"ResNet-20, CIFAR-10": "resnet20 -> gtsrb", "MiniLM, SST-2": "minilm -> sst2"}
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
ACCURACY = 1e-3
TRACE_ERROR = 0.05
REFERENCE_MATVECS = 120
# Seconds: where a run took longer, the tighter tolerances are not tried.
PATIENCE = 400


def batch_of(name: str, data: Path, samples: int) -> tuple[nn.Module, Any, torch.Tensor]:
    torch.manual_seed(0)
    real = real_pair(NETWORKS[name], data)
    x, y = real.source if isinstance(real.source, tuple) else real.train
    return real.model.eval(), pick(x, slice(samples)), y[:samples]


def agreement(name: str, H: Hessian) -> Record:
    """A row: top 5 against ARPACK on the same operator, the trace against a long plain estimate."""
    ours = H.top(5, tol=1e-5)
    values = sorted(ours.values.tolist(), key=abs, reverse=True)
    theirs = eigsh(H.to_scipy(), k=5, which="LM", tol=1e-5, return_eigenvectors=False)
    theirs = sorted(theirs.tolist(), key=abs, reverse=True)
    worst = max(abs(a - b) / abs(b) for a, b in zip(values, theirs, strict=True))
    short = H.trace()
    long = H.trace(num_matvecs=REFERENCE_MATVECS, method="hutchinson", seed=100)
    off = abs(short.value - long.value) / (short.stderr**2 + long.stderr**2) ** 0.5
    return {
        "network": name,
        "parameters": f"{H.shape[0]:,}",
        "top 5": ", ".join(f"{v:.5g}" for v in values),
        "largest relative difference to eigsh": f"{worst:.1e}",
        "products": ours.num_matvecs,
        "trace (48 products)": f"{short.value:.4g} ± {short.stderr:.2g}",
        f"trace ({REFERENCE_MATVECS} products)": f"{long.value:.4g} ± {long.stderr:.2g}",
        "difference / error": f"{off:.1f}",
    }


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def to_accuracy(
    solve: Callable[[float], list[float]], truth: list[float]
) -> tuple[float | None, float]:
    """(seconds, or None if not reached; largest relative error of the best run)."""
    best = float("inf")
    for tolerance in TOLERANCES:
        took, values = seconds(lambda t=tolerance: solve(t))  # type: ignore[misc]
        ordered = sorted(values, key=abs, reverse=True)
        error = max(abs(a - b) / abs(b) for a, b in zip(ordered, truth, strict=True))
        best = min(best, error)
        if error <= ACCURACY:
            return took, error
        if took > PATIENCE:
            break
    return None, best


def eigenvalue_methods(
    model: nn.Module, x: Any, y: torch.Tensor, k: int
) -> dict[str, Callable[[float], list[float]]]:
    def ours(tol: float) -> list[float]:
        return Hessian(model, F.cross_entropy, (x, y)).top(k, tol=tol).values.tolist()

    methods: dict[str, Callable[[float], list[float]]] = {"fast": ours}
    if importlib.util.find_spec("curvlinops"):
        import curvlinops

        def theirs(tol: float) -> list[float]:
            params = list(model.parameters())
            A = curvlinops.HessianLinearOperator(
                model, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False
            )
            return eigsh(A.to_scipy(), k=k, which="LM", tol=tol, return_eigenvectors=False).tolist()

        methods["curvlinops + eigsh"] = theirs
    if importlib.util.find_spec("pyhessian"):
        methods["PyHessian"] = lambda tol: quiet(
            lambda: _pyhessian(model, x, y).eigenvalues(maxIter=300, tol=tol, top_n=k)[0]
        )
    return methods


def _pyhessian(model: nn.Module, x: Any, y: torch.Tensor) -> Any:
    import pyhessian

    return pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)


def quiet(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def trace_times(model: nn.Module, x: Any, y: torch.Tensor) -> list[tuple[str, float, str]]:
    """The method, seconds until the standard error is TRACE_ERROR of the trace, the estimate."""
    rows = []

    def ours() -> Any:
        H = Hessian(model, F.cross_entropy, (x, y))
        n = 24
        while True:
            estimate = H.trace(num_matvecs=n)
            if estimate.stderr <= TRACE_ERROR * abs(estimate.value):
                return estimate
            n *= 2

    took, estimate = seconds(ours)
    rows.append(("fast", took, str(estimate)))
    if importlib.util.find_spec("pyhessian"):

        def theirs() -> tuple[list[float], float]:
            # Its own rule stops when the mean moves little; here it stops at the same error.
            n = 24
            while True:
                values = quiet(lambda n=n: _pyhessian(model, x, y).trace(maxIter=n, tol=0.0))
                error = statistics.stdev(values) / len(values) ** 0.5
                if error <= TRACE_ERROR * abs(statistics.mean(values)):
                    return values, error
                n *= 2

        took, (values, error) = seconds(theirs)
        text = f"{statistics.mean(values):.4g} +- {error:.2g} ({len(values)} products)"
        rows.append(("PyHessian", took, text))
    return rows


def time_rows(model: nn.Module, x: Any, y: torch.Tensor) -> Iterator[Record]:
    operator = Hessian(model, F.cross_entropy, (x, y))
    for k in (1, 5):
        truth = operator.top(k, tol=1e-7, max_matvecs=2000).values.tolist()
        base = None
        for name, solve in eigenvalue_methods(model, x, y, k).items():
            took, error = to_accuracy(solve, truth)
            base = took if base is None else base
            text = "not reached" if took is None else f"{took:.1f}"
            ratio = "-" if took is None or base is None else f"{took / base:.2f}"
            yield time_row(f"top {k}", name, text, ratio, f"{error:.1e}")
    base = None
    for name, took, text in trace_times(model, x, y):
        base = took if base is None else base
        yield time_row("trace", name, f"{took:.1f}", f"{took / base:.2f}", text)


def time_row(what: str, method: str, seconds: str, ratio: str, outcome: str) -> Record:
    return {
        "what": what,
        "method": method,
        "seconds": seconds,
        "x fast": ratio,
        "error or estimate": outcome,
    }


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder: real_pairs.py")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--save", metavar="NAME", help="writes benchmarks/results/NAME.md")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def agreements() -> Iterator[Record]:
        for name in NETWORKS:
            samples = args.samples if "ResNet" in name else args.samples // 4
            model, x, y = batch_of(name, args.data, samples)
            inputs = tuple(x.values()) if isinstance(x, dict) else x
            yield agreement(name, Hessian(model, F.cross_entropy, (inputs, y)))

    resnet = batch_of("ResNet-20, CIFAR-10", args.data, args.samples)
    goal = f"every eigenvalue is within {ACCURACY:g}, the trace's standard error {TRACE_ERROR:.0%}"
    lines = [
        f"{args.samples} samples, float32, one thread, exact Hessian.",
        "",
        *table(shown(agreements())),
        "",
        f"ResNet-20: processor seconds until {goal}.",
        "",
        *table(shown(time_rows(*resnet))),
    ]
    if args.save:
        save(args.save, lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
