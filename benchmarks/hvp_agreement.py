"""Eigenvalues and trace of real networks' losses: against scipy, and the time to them against
PyHessian and curvlinops where those are installed.

    python benchmarks/hvp_agreement.py --data FOLDER [--samples 64] [--save NAME]

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn

from compare import RESULTS
from fast.curvature import Hessian, keep_freed_memory
from pairs import PAIRS, Folder

NETWORKS = {"ResNet-20, CIFAR-10": "resnet20 -> gtsrb", "MiniLM, SST-2": "minilm -> sst2"}
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
ACCURACY = 1e-3
TRACE_ERROR = 0.05
REFERENCE_MATVECS = 120
# A run that takes longer is not waited for.
PATIENCE = 400


def batch_of(name: str, folder: Folder, samples: int) -> tuple[nn.Module, Any, torch.Tensor]:
    torch.manual_seed(0)
    job = PAIRS[NETWORKS[name]].make(folder)
    x, y = job.source if isinstance(job.source, tuple) else job.train
    picked = {k: v[:samples] for k, v in x.items()} if isinstance(x, dict) else x[:samples]
    return job.model.eval(), picked, y[:samples]


def agreement(name: str, H: Hessian) -> list[str]:
    """Top 5 against ARPACK on the same operator; the trace against a long plain estimate."""
    ours = H.top(5, tol=1e-5)
    values = sorted(ours.values.tolist(), key=abs, reverse=True)
    theirs = eigsh(H.to_scipy(), k=5, which="LM", tol=1e-5, return_eigenvectors=False)
    theirs = sorted(theirs.tolist(), key=abs, reverse=True)
    worst = max(abs(a - b) / abs(b) for a, b in zip(values, theirs, strict=True))
    short = H.trace()
    long = H.trace(num_matvecs=REFERENCE_MATVECS, method="hutchinson", seed=100)
    off = abs(short.value - long.value) / (short.stderr**2 + long.stderr**2) ** 0.5
    top = ", ".join(f"{v:.5g}" for v in values)
    return [name, f"{H.shape[0]:,}", top, f"{worst:.1e}", str(ours.num_matvecs),
            f"{short.value:.4g} ± {short.stderr:.2g}", f"{long.value:.4g} ± {long.stderr:.2g}",
            f"{off:.1f}"]  # fmt: skip


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

    found = {"fast": ours}
    if importlib.util.find_spec("curvlinops"):
        import curvlinops

        def theirs(tol: float) -> list[float]:
            params = list(model.parameters())
            A = curvlinops.HessianLinearOperator(
                model, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False
            )
            return eigsh(A.to_scipy(), k=k, which="LM", tol=tol, return_eigenvectors=False).tolist()

        found["curvlinops + eigsh"] = theirs
    if importlib.util.find_spec("pyhessian"):
        found["PyHessian"] = lambda tol: _quiet(
            lambda: _pyhessian(model, x, y).eigenvalues(maxIter=300, tol=tol, top_n=k)[0]
        )
    return found


def _pyhessian(model: nn.Module, x: Any, y: torch.Tensor) -> Any:
    import pyhessian

    return pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)


def _quiet(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def trace_times(model: nn.Module, x: Any, y: torch.Tensor) -> list[tuple[str, float, str]]:
    """Seconds until the standard error is TRACE_ERROR of the trace."""
    found = []

    def ours() -> Any:
        H = Hessian(model, F.cross_entropy, (x, y))
        n = 24
        while True:
            estimate = H.trace(num_matvecs=n)
            if estimate.stderr <= TRACE_ERROR * abs(estimate.value):
                return estimate
            n *= 2

    took, estimate = seconds(ours)
    found.append(("fast", took, str(estimate)))
    if importlib.util.find_spec("pyhessian"):

        def theirs() -> tuple[list[float], float]:
            # Its own rule stops when the mean moves little; here it stops at the same error.
            n = 24
            while True:
                values = _quiet(lambda n=n: _pyhessian(model, x, y).trace(maxIter=n, tol=0.0))
                error = statistics.stdev(values) / len(values) ** 0.5
                if error <= TRACE_ERROR * abs(statistics.mean(values)):
                    return values, error
                n *= 2

        took, (values, error) = seconds(theirs)
        text = f"{statistics.mean(values):.4g} +- {error:.2g} ({len(values)} products)"
        found.append(("PyHessian", took, text))
    return found


def time_table(model: nn.Module, x: Any, y: torch.Tensor) -> list[str]:
    lines = ["| what | method | seconds | x fast | error or estimate |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    operator = Hessian(model, F.cross_entropy, (x, y))
    for k in (1, 5):
        truth = operator.top(k, tol=1e-7, max_matvecs=2000).values.tolist()
        base = None
        for name, solve in eigenvalue_methods(model, x, y, k).items():
            took, error = to_accuracy(solve, truth)
            base = took if base is None else base
            shown = "not reached" if took is None else f"{took:.1f}"
            ratio = "-" if took is None or base is None else f"{took / base:.2f}"
            lines.append(f"| top {k} | {name} | {shown} | {ratio} | {error:.1e} |")
            print(lines[-1], flush=True)
    base = None
    for name, took, text in trace_times(model, x, y):
        base = took if base is None else base
        lines.append(f"| trace | {name} | {took:.1f} | {took / base:.2f} | {text} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="see pairs.py")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--save", metavar="NAME", help="writes benchmarks/results/NAME.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Folder(arguments.data)
    header = ["network", "parameters", "top 5", "largest relative difference to eigsh", "products",
              "trace (48 products)", f"trace ({REFERENCE_MATVECS} products)",
              "difference / error"]  # fmt: skip
    lines = [f"{arguments.samples} samples, float32, one thread, exact Hessian.", "",
             f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]  # fmt: skip
    for name in NETWORKS:
        samples = arguments.samples if "ResNet" in name else arguments.samples // 4
        model, x, y = batch_of(name, folder, samples)
        inputs = tuple(x.values()) if isinstance(x, dict) else x
        row = agreement(name, Hessian(model, F.cross_entropy, (inputs, y)))
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    model, x, y = batch_of("ResNet-20, CIFAR-10", folder, arguments.samples)
    goal = f"every eigenvalue is within {ACCURACY:g}, the trace's standard error {TRACE_ERROR:.0%}"
    lines += ["", f"ResNet-20: processor seconds until {goal}.", "", *time_table(model, x, y)]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{arguments.save}.md").write_text(text)


if __name__ == "__main__":
    main()
