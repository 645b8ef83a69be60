"""The update of this tree beside that of another one, in one interleaved run.

    python -m benchmarks.kernels.builds.before_after --before TREE --set resnet50 --save update-NAME

TREE is a checkout of the project with its native module built. Each tree has a process of its own,
and they take turns round by round; a round times torch's fused AdamW, the methods and the memory
floor of each. Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import RESULTS, Record, save, table

ROOT = Path(__file__).parents[3]
BASE = "torch fused"
METHODS = [
    f"ours: {name}"
    for name in (
        "AdamW",
        "+ anchor + curvature + norms",
        "whole job",
        "whole job, bf16 state",
        "whole job, 8-bit state",
    )
]


def work(name: str, methods: list[str]) -> None:
    """Time a round for every line of the standard input."""
    from benchmarks.common import commit
    from benchmarks.kernels.bench_update import METHODS as MAKE
    from benchmarks.kernels.bench_update import check, floor
    from benchmarks.kernels.interleaved import _round
    from benchmarks.kernels.shapes import SETS
    from benchmarks.kernels.tensors import Tensors

    tensors = Tensors(SETS[name]())
    steps = {}
    for key in [BASE, *methods]:
        method = MAKE[key](tensors)
        check(tensors, method)
        steps[key], steps[f"floor: {key}"] = method.step, floor(method)[1]
    print(commit(), flush=True)
    for _ in sys.stdin:
        now = _round(steps)
        print(json.dumps({"wall": now.wall, "cpu": now.cpu, "others": now.others}), flush=True)


class Worker:
    """The process of one tree."""

    def __init__(self, tree: Path, threads: int, name: str) -> None:
        path = os.pathsep.join(map(str, (tree / "python", tree)))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(Path(__file__).resolve()), "--work", name]
        self._process: subprocess.Popen[str] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            env=environment,
        )  # fmt: skip
        self.commit = self._read()
        self.rounds: list[Record] = []

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a tree has no such benchmark; its error is above")
        return line.strip()

    def round(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.rounds.append(json.loads(self._read()))

    def close(self) -> None:
        self._process.communicate()

    def ratio(self, clock: str, method: str, base: str) -> float:
        return median(r[clock][method] / max(r[clock][base], 1e-9) for r in self.rounds)


def rows(workers: dict[str, Worker], name: str, threads: int) -> list[dict[str, Any]]:
    result = []
    for method in METHODS:
        row: dict[str, Any] = {"set": name, "threads": threads, "method": method}
        for when, worker in workers.items():
            for clock in ("wall", "cpu"):
                for what, base in (("fused", BASE), ("floor", f"floor: {method}")):
                    ratio = worker.ratio(clock, method, base)
                    row[f"{clock} to {what}, {when}"] = float(f"{ratio:.4g}")
        result.append(row)
    return result


def processor() -> str:
    import cpuinfo
    import torch

    from fastkernels.backends import native

    info = cpuinfo.get_cpu_info()
    return (
        f"{info['brand_raw']}, {info['count']} cores; Python {info['python_version']}, torch "
        f"{torch.__version__}, {native.available()[1]}"
    )


def report(records: list[dict[str, Any]]) -> list[str]:
    cells = [
        {"set": r["set"], "threads": r["threads"], "method": r["method"]}
        | {
            f"{'CPU time' if clock == 'cpu' else 'time'} x {what}": " -> ".join(
                f"{r[f'{clock} to {what}, {when}']:.2f}" for when in ("before", "after")
            )
            for what in ("fused", "floor")
            for clock in ("wall", "cpu")
        }
        for r in records
    ]
    return table(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="the other tree")
    parser.add_argument("--set", action="append", help="of benchmarks/kernels/shapes.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", metavar="NAME", help="of the files in benchmarks/results/")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, METHODS)
    records, conditions = [], []
    for name in args.set or ["resnet50", "small_2000"]:
        trees = {"before": args.before.resolve(), "after": ROOT}
        workers = {when: Worker(tree, args.threads, name) for when, tree in trees.items()}
        for i in range(args.rounds):
            for worker in list(workers.values())[:: 1 if i % 2 else -1]:
                worker.round()
        for worker in workers.values():
            worker.close()
        records += rows(workers, name, args.threads)
        others = median(r["others"] for w in workers.values() for r in w.rounds)
        commits = " -> ".join(worker.commit for worker in workers.values())
        conditions.append(
            f"{name}: commits {commits}, {args.rounds} rounds, other processes took {others:.1f} "
            "cores"
        )
        where = f"{processor()}; " + "; ".join(conditions)
        lines = [*report(records), "", where]
        if args.save:
            save(args.save, lines)
            data = {"machine": where, "rows": records}
            (RESULTS / f"{args.save}.json").write_text(json.dumps(data, indent=1) + "\n")
        else:
            print("\n".join(lines))


if __name__ == "__main__":
    main()
