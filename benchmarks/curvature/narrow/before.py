"""Products on a cached batch, by this code and by an older one.

    git worktree add --detach OLDER ee9472b
    python -m benchmarks.curvature.narrow.before --older OLDER [--save]

Each code has a process of its own on one thread, and both take turns: in every round each times a
gradient and a product, in processor seconds. Figures are medians over rounds, in gradients. The
first ten products of each are not counted. ee9472b is the last commit before records became
programs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import Record, commits, complete, machine, save, table
from benchmarks.curvature.narrow.networks import NETWORKS
from fast.curvature import GGN, Hessian

ROOT = Path(__file__).parents[3]
KINDS = {"ggn": GGN, "hessian": Hessian}
WARM_UPS = 10


def serve(name: str, kind: str, count: int) -> None:
    """One line with the gradients of a product for every line that comes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, y = NETWORKS[name]()
    model.eval()
    params = dict(model.named_parameters())
    vectors = {n: torch.randn(count, *p.shape) for n, p in params.items()}
    operator = KINDS[kind](model, F.cross_entropy, (x, y))
    for _ in range(WARM_UPS):
        operator @ vectors
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        torch.autograd.grad(F.cross_entropy(model(x), y), list(params.values()))
        middle = time.process_time()
        operator @ vectors
        print((time.process_time() - middle) / (middle - start), flush=True)


def start(code: Path, setting: list[str]) -> subprocess.Popen[str]:
    """`serve` with the package `fast` of a checkout."""
    command = [sys.executable, "-m", "benchmarks.curvature.narrow.before", "--serve", *setting]
    path = os.pathsep.join([str(code / "python"), str(ROOT)])
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def answer(process: subprocess.Popen[str], question: str | None = None) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if question is not None:
        process.stdin.write(question)
        process.stdin.flush()
    return process.stdout.readline()


def measure(network: str, matrix: str, K: int, older: Path, rounds: int) -> Record:
    setting = [network, matrix, str(K)]
    codes = {"older": start(older, setting), "now": start(ROOT, setting)}
    for process in codes.values():
        assert answer(process) == "ready\n"
    figures: dict[str, list[float]] = {code: [] for code in codes}
    for _ in range(rounds):
        for code, process in codes.items():
            figures[code].append(float(answer(process, "\n")))
    for process in codes.values():
        process.communicate()
    row: Record = {code: round(statistics.median(values), 2) for code, values in figures.items()}
    return row | {"now / older": round(row["now"] / row["older"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--older", type=Path, help="a checkout of the older code")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cached.md")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        name, kind, count = args.serve
        serve(name, kind, int(count))
        return
    settings = [
        {"network": name, "matrix": kind, "K": count}
        for name in NETWORKS
        for kind in KINDS
        for count in (1, 8)
    ]
    records = complete("cached", measure, settings, older=args.older, rounds=args.rounds)
    rows = [{k: v for k, v in r.items() if k != "commit"} for r in records]
    if args.save:
        save("cached", [__doc__ or "", *table(rows), "", f"{machine()}; {commits(records)}"])


if __name__ == "__main__":
    main()
