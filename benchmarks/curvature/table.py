"""Make Markdown tables of the curvature benchmark's JSON.

    python benchmarks/compare_hvp.py RESULT.json [RESULT.json ...] [--targets] [--save NAME]

`--save NAME` keeps what the tables are made of, and the tables, in `benchmarks/results/NAME.json`
and `.md`; the kept file can be read again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.kernels.table import machine

OURS = "fast"
LOOP = "kept-graph loop"
# Gradients per product that the project set itself: (case, kind, K) -> at most.
TARGETS = {
    ("mlp", "hessian", 32): 1.60,
    ("mlp", "ggn", 32): 1.15,
    ("head", "hessian", 32): 0.90,
    ("resnet20", "hessian", 8): 2.5,
    ("resnet20", "ggn", 8): 1.9,
    ("vit", "hessian", 8): 2.3,
    ("vit", "ggn", 8): 1.5,
}
MEMORY_TARGETS = {("vit", 32): 2048, ("head", 32): 150}  # MiB
# "auto" may be slower than the loop over the kept graph by this much.
NEVER_SLOWER = 1.05

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """`extra_info` of each benchmark, and the machine's name."""
    data = json.loads(path.read_text())
    if "rows" in data:
        return list(data["rows"])
    name = machine(data["machine_info"])
    threads = data["machine_info"]["threads"]
    rows = []
    for b in data["benchmarks"]:
        info = b["extra_info"]
        if "gradients_per_product" in info or "peak_mib" in info:
            rows.append(info | {"machine": name, "threads": threads})
            if "gradients_per_product" in info:
                rows[-1]["ms"] = b["stats"]["median"] * 1e3
    return rows


def table(rows: list[Row]) -> Iterator[str]:
    """Of one network and one matrix: a row per method and K."""
    yield f"### {rows[0]['case']}, {rows[0]['kind']}"
    yield ""
    yield (
        "| method | K | gradients per product (range) | ms per product | x floor "
        "| error in float64 | peak MiB |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    memory = {(r["method"], r["count"]): r["peak_mib"] for r in rows if "peak_mib" in r}
    timed = [r for r in rows if "gradients_per_product" in r]
    for r in sorted(timed, key=lambda r: (r["count"], r["method"] != OURS)):
        low, high = r["range"]
        wrong = " **wrong**" if r["wrong"] else ""
        peak = memory.get((r["method"], r["count"]))
        yield (
            f"| {r['method']} | {r['count']} "
            f"| {r['gradients_per_product']:.2f} ({low:.2f}..{high:.2f}) "
            f"| {r['ms'] / r['count']:.1f} | {r['ms'] / r['floor_ms']:.2f} "
            f"| {r['relative_error']:.0e}{wrong} | {'-' if peak is None else f'{peak:.0f}'} |"
        )


def promises(rows: list[Row]) -> Iterator[str]:
    """What was promised beside what was measured."""
    yield "| promise | bound | measured | met |"
    yield "| --- | --- | --- | --- |"

    def line(what: str, value: float, bound: float) -> str:
        return f"| {what} | {bound:g} | {value:.2f} | {'yes' if value <= bound else 'no'} |"

    def key(r: Row) -> tuple[str, str, int]:
        return r["case"], r["kind"], r["count"]

    timed = {(*key(r), r["method"]): r for r in rows if "gradients_per_product" in r}
    for what, bound in TARGETS.items():
        if found := timed.get((*what, OURS)):
            case, kind, count = what
            text = f"{case}, {kind}, K = {count}: gradients per product"
            yield line(text, found["gradients_per_product"], bound)
    for (case, count), bound in MEMORY_TARGETS.items():
        for r in rows:
            if "peak_mib" in r and (r["case"], r["count"], r["method"]) == (case, count, OURS):
                yield line(f"{case}, {r['kind']}, K = {count}: peak MiB", r["peak_mib"], bound)
    for (case, kind, count, method), loop in timed.items():
        ours = timed.get((case, kind, count, OURS))
        if method == LOOP and ours is not None:
            ratio = ours["gradients_per_product"] / loop["gradients_per_product"]
            yield line(f"{case}, {kind}, K = {count}: auto / {LOOP}", ratio, NEVER_SLOWER)


def report(rows: list[Row], targets: bool) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["kind"]), []).append(row)
    lines: list[str] = []
    for found in groups.values():
        lines += [*table(found), ""]
    for name, threads in dict.fromkeys((r["machine"], r["threads"]) for r in rows):
        rate = [r["gemm_gflops"] for r in rows if r["machine"] == name and "gemm_gflops" in r]
        best = f"; a plain GEMM at up to {max(rate):.0f} GFLOP/s" if rate else ""
        lines += [f"{name}; {threads} threads{best}.", ""]
    if targets:
        lines += [*promises(rows), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--targets", action="store_true", help="what was promised, and is it met")
    parser.add_argument("--save", metavar="NAME", help="of the files in benchmarks/results/")
    arguments = parser.parse_args()
    rows = [row for path in arguments.results for row in read(path)]
    text = report(rows, arguments.targets)
    print(text)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{arguments.save}.md").write_text(text)
        kept = ",\n".join(json.dumps(row) for row in rows)
        (RESULTS / f"{arguments.save}.json").write_text(f'{{"rows": [\n{kept}\n]}}\n')


if __name__ == "__main__":
    main()
