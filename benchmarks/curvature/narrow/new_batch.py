"""Products on batches that come anew, on networks so small that only overhead counts.

    python -m benchmarks.curvature.narrow.new_batch [--networks NAMES] [--save]

Every round times one gradient and each method once, one after the other, in processor seconds of
one thread: figures are medians of the ratios to the gradient of the same round. A cached batch is
multiplied with again; on a new one everything is computed anew. Every product is compared with
that of vmap first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import Record, commits, complete, machine, save, table
from benchmarks.curvature import methods
from benchmarks.curvature.narrow.networks import NETWORKS
from fast.curvature import GGN, Hessian

KINDS = {"ggn": GGN, "hessian": Hessian}
VMAP = {"hessian": "vmap(jvp(grad))", "ggn": "vmap(jvp, vjp)"}


def measure(network: str, matrix: str, K: int, rounds: int) -> Record:
    """Medians of the methods, in gradients."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[network]()
    model.eval()
    kind, vectors = KINDS[matrix], methods.probes(model, K)
    new = kind(model, F.cross_entropy, (x, y), cache=False)
    cached = kind(model, F.cross_entropy, (x, y))
    runs = {
        "new": lambda: new @ vectors,
        "cached": lambda: cached @ vectors,
        "vmap": methods.METHODS[matrix][VMAP[matrix]](model, x, y, vectors),
    }
    truth = runs["vmap"]()
    for method in ("new", "cached"):
        for _ in range(3):  # recorded, traced, run
            error = methods.difference(runs[method](), truth)
        assert error < 1e-4, (network, matrix, method, error)
    gradient = methods.gradient(model, x, y)
    ratios: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(rounds):
        one = _seconds(gradient)
        for method, run in runs.items():
            ratios[method].append(_seconds(run) / one)
    row: Record = {method: statistics.median(r) for method, r in ratios.items()}
    pairs = zip(ratios["new"], ratios["vmap"], strict=True)
    return row | {"new / vmap": statistics.median(a / b for a, b in pairs)}


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, split by commas")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/new-batch.md")
    args = parser.parse_args()
    settings = [
        {"network": name, "matrix": kind, "K": count}
        for name in NETWORKS
        if name in args.networks
        for kind in KINDS
        for count in (1, 8)
    ]
    records = complete("new-batch", measure, settings, rounds=args.rounds)
    rows = [
        {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in r.items() if k != "commit"}
        for r in sorted(records, key=lambda r: list(NETWORKS).index(r["network"]))
    ]
    if args.save:
        save("new-batch", [__doc__ or "", *table(rows), "", f"{machine()}; {commits(records)}"])


if __name__ == "__main__":
    main()
