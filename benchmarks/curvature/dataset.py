"""Trace, top 5 and diagonal over 64 batches, beside curvlinops and PyHessian.

    python -m benchmarks.curvature.dataset --data FOLDER [--pairs NAMES] [--quantities ..] [--save]

Everybody gets the same batches in the same process; one gradient over all batches is timed before
and after each method, and is the unit. Times are processor seconds of one thread, in float32.
Traces (by Hutchinson's estimator) and diagonals take the same number of products everywhere.
Eigenvalues are those of the exact Hessian, to a tolerance that brings them within 1 % of the truth,
which is found to a tighter one: ours is a share of the largest eigenvalue, SciPy's of each.
PyHessian has neither diagonal nor GGN, and its power iteration is left out on MiniLM, where it
would take an hour. Attention of the others is computed by plain products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.curvature.agreement import quiet
from benchmarks.curvature.methods import gradient
from benchmarks.curvature.networks import Packed
from benchmarks.real_pairs import real_pair
from fast.curvature import GGN, Hessian, keep_freed_memory

BATCHES = 64
NETWORKS = {"ResNet-20, CIFAR-10": "resnet20 -> gtsrb", "MiniLM, SST-2": "minilm -> sst2"}
SAMPLES = {"ResNet-20, CIFAR-10": 4, "MiniLM, SST-2": 2}
TOKENS = 16
PRODUCTS = 4  # of a trace or a diagonal
QUANTITIES = ("trace", "diagonal", "trace of the GGN", "top 5")
TOLERANCE, SCIPY_TOLERANCE, TRUE_TOLERANCE = 2e-3, 1e-2, 5e-4  # of the top 5
POWER_ITERATIONS = 20  # at most, for one eigenvalue
Batches = list[tuple[torch.Tensor, torch.Tensor]]
Problem = tuple[nn.Module, Batches]
Run = Callable[[], Any]


def problem(name: str, data: Path) -> Problem:
    torch.manual_seed(0)
    real, samples = real_pair(NETWORKS[name], data), SAMPLES[name]
    x, y = real.source if isinstance(real.source, tuple) else real.train
    model: nn.Module = real.model
    if isinstance(x, dict):
        model, x = Packed(model), torch.stack([x["ids"], x["mask"]], 1)[:, :, :TOKENS]
    pairs = zip(x.split(samples), y.split(samples), strict=True)
    return model.eval(), [pair for pair, _ in zip(pairs, range(BATCHES), strict=False)]


def ours(model: nn.Module, data: Any, quantity: str, products: int) -> Run:
    kind = GGN if "GGN" in quantity else Hessian
    operator = kind(model, F.cross_entropy, data)
    if quantity == "diagonal":
        return lambda: operator.diagonal(num_matvecs=products)
    if quantity == "top 5":
        return lambda: eigenvalues(operator, TOLERANCE)
    return lambda: float(operator.trace(num_matvecs=products, method="hutchinson"))


def eigenvalues(operator: Hessian, tol: float) -> list[float]:
    return by_magnitude(operator.top(5, tol=tol).values.tolist())


def by_magnitude(values: list[float]) -> list[float]:
    return sorted(values, key=abs, reverse=True)


def curvlinops(model: nn.Module, data: Any, quantity: str, products: int) -> Run:
    import curvlinops as lib

    name = "GGN" if "GGN" in quantity else "Hessian"
    operator = getattr(lib, f"{name}LinearOperator")(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False
    )
    if quantity == "diagonal":
        return lambda: lib.hutchinson_diag(operator, products)
    if quantity == "top 5":
        matrix = operator.to_scipy()
        return lambda: by_magnitude(
            eigsh(matrix, k=5, which="LM", tol=SCIPY_TOLERANCE, return_eigenvectors=False).tolist()
        )
    return lambda: lib.hutchinson_trace(operator, products).item()


def pyhessian(model: nn.Module, data: Any, quantity: str, products: int) -> Run:
    from pyhessian import hessian

    operator = hessian(model, nn.CrossEntropyLoss(), dataloader=data, cuda=False)
    if quantity == "top 5":
        options = {"maxIter": POWER_ITERATIONS, "tol": 1e-3, "top_n": 5}
        return lambda: quiet(lambda: operator.eigenvalues(**options)[0])
    return lambda: statistics.mean(operator.trace(maxIter=products, tol=0.0))


def applies(method: str, network: str, quantity: str) -> bool:
    if method != "PyHessian":
        return True
    return quantity == "trace" or (quantity == "top 5" and "MiniLM" not in network)


METHODS = {"fast": ours, "curvlinops": curvlinops, "PyHessian": pyhessian}


def measure(network: str, quantity: str, data: Path) -> Record:
    """Gradients of every method, and what it found."""
    keep_freed_memory()
    model, batches = problem(network, data)
    record: Record = {"machine": machine()}
    for name, prepare in METHODS.items():
        if not applies(name, network, quantity):
            continue
        one = [_gradient_seconds(model, batches)]
        kernels: AbstractContextManager[Any] = nullcontext()
        if name != "fast":
            kernels = sdpa_kernel(SDPBackend.MATH)
        with kernels:
            seconds, found = _seconds(prepare(model, batches, quantity, PRODUCTS))
        one.append(_gradient_seconds(model, batches))
        record[name] = {"seconds": seconds, "gradients": seconds / statistics.mean(one)}
        record[name]["found"] = found.norm().item() if quantity == "diagonal" else found
        model.zero_grad()
    if quantity == "top 5":
        record["truth"] = eigenvalues(Hessian(model, F.cross_entropy, batches), TRUE_TOLERANCE)
    return record


def _gradient_seconds(model: nn.Module, batches: Batches) -> float:
    """Time of one gradient over all batches."""
    return _seconds(lambda: [gradient(model, x, y)() for x, y in batches])[0]


def _seconds(run: Run) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def rows(records: list[Record]) -> list[Record]:
    out = []
    for r in records:
        best = min(r[m]["gradients"] for m in METHODS if m in r and m != "fast")
        for name in METHODS:
            if name in r:
                found = r[name]["found"]
                if r["quantity"] == "top 5":
                    pairs = zip(by_magnitude(found), r["truth"], strict=True)
                    worst = max(abs(a - b) / abs(b) for a, b in pairs)
                    found = f"within {worst:.0e}"
                out.append(
                    {
                        "network": r["network"],
                        "what": r["quantity"],
                        "method": name,
                        "seconds": f"{r[name]['seconds']:.0f}",
                        "gradients": f"{r[name]['gradients']:.1f}",
                        "x the better peer": f"{r[name]['gradients'] / best:.2f}",
                        "found": f"{found:.4g}" if isinstance(found, float) else found,
                    }
                )
    return out


def main() -> None:
    parser = arguments(__doc__, ",".join(NETWORKS))
    parser.add_argument("--quantities", default=",".join(QUANTITIES), help="split by commas")
    parser.add_argument("--save", action="store_true", help="write results/curvature_dataset.md")
    args = parser.parse_args()
    names = [n for n in NETWORKS if n in args.pairs]
    asked = args.quantities.split(",")
    settings = [{"network": n, "quantity": q} for q in QUANTITIES for n in names if q in asked]
    records = complete("curvature_dataset", measure, settings, data=args.data)
    lines = [*table(rows(records)), "", f"{records[0]['machine']}; {commits(records)}"]
    if args.save:
        save("curvature_dataset", [__doc__ or "", *lines])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
