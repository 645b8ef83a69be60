"""Products on batches that come anew, on networks so small that only overhead counts.

    python -m benchmarks.curvature.narrow.new_batch --save

Every round times one gradient and each method once, one after the other, in processor seconds of
one thread: figures are medians of the ratios to the gradient of the same round. A cached batch is
multiplied with again; on a new one everything is computed anew. Every product is compared with
that of vmap first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import RESULTS, Record, commit, machine, save, table
from benchmarks.curvature import methods
from benchmarks.curvature.narrow.networks import NETWORKS
from fast.curvature import GGN, Hessian

VMAP = {Hessian: "vmap(jvp(grad))", GGN: "vmap(jvp, vjp)"}


def measure(name: str, kind: type[Hessian | GGN], count: int, rounds: int) -> Record:
    """Medians of the methods, in gradients."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[name]()
    model.eval()
    vectors = methods.probes(model, count)
    new = kind(model, F.cross_entropy, (x, y), cache=False)
    cached = kind(model, F.cross_entropy, (x, y))
    which = kind.__name__.lower()
    runs = {
        "new": lambda: new @ vectors,
        "cached": lambda: cached @ vectors,
        "vmap": methods.METHODS[which][VMAP[kind]](model, x, y, vectors),
    }
    truth = runs["vmap"]()
    for method in ("new", "cached"):
        for _ in range(3):  # recorded, traced, run
            error = methods.difference(runs[method](), truth)
        assert error < 1e-4, (name, which, method, error)
    gradient = methods.gradient(model, x, y)
    ratios: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(rounds):
        one = _seconds(gradient)
        for method, run in runs.items():
            ratios[method].append(_seconds(run) / one)
    row: Record = {"network": name, "matrix": which, "K": count}
    row |= {method: statistics.median(r) for method, r in ratios.items()}
    pairs = zip(ratios["new"], ratios["vmap"], strict=True)
    return row | {"new / vmap": statistics.median(a / b for a, b in pairs)}


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/new-batch.*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in NETWORKS:
        for kind in (GGN, Hessian):
            for count in (1, 8):
                rows.append(measure(name, kind, count, arguments.rounds))
                print(rows[-1], flush=True)
    if arguments.save:
        data = {"commit": commit(), "machine": machine(), "rows": rows}
        (RESULTS / "new-batch.json").write_text(json.dumps(data, indent=1) + "\n")
        cells = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
        save("new-batch", [__doc__ or "", *table(cells), "", f"{data['machine']}; {commit()}"])


if __name__ == "__main__":
    main()
