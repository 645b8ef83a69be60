"""From the JSON of `gpu_update.py` and `gpu_hvp.py` to tables beside it.

python benchmarks/compare_gpu.py benchmarks/results/*-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def update_table(rows: list[Row]) -> Iterator[str]:
    """Of each set and variant: every backend and torch's plain AdamW, ms and share of a copy."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    yield f"| set | variant | {' | '.join(methods)} |"
    yield "| --- | --- |" + " --- |" * len(methods)
    cells = {(r["set"], r["variant"], r["method"]): r for r in rows}
    for name, variant in dict.fromkeys((r["set"], r["variant"]) for r in rows):
        found = [cells[name, variant, method] for method in methods]
        texts = [f"{r['ms']:.3f} ms, {r['of_copy']:.0%}" for r in found]
        yield f"| {name} | {variant} | {' | '.join(texts)} |"


def op_table(rows: list[Row]) -> Iterator[str]:
    yield "| op | vectors, rows, classes | dtype | ms | of a copy |"
    yield "| --- | --- | --- | --- | --- |"
    for r in rows:
        shape = f"{r['count']}, {r['rows']}, {r['classes']}"
        dtype = r["dtype"].removeprefix("torch.")
        yield f"| {r['op']} | {shape} | {dtype} | {r['ms']:.3f} | {r['of_copy']:.0%} |"


def products_table(rows: list[Row]) -> Iterator[str]:
    yield "| case | method | K | gradients per product (range) | peak GiB | error in float64 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for r in rows:
        case = f"{r['case']} {r['kind']}"
        if "failed" in r:
            yield f"| {case} | {r['method']} | {r.get('count', '')} | {r['failed'][:60]} | | |"
            continue
        low, high = r["range"]
        yield (
            f"| {case} | {r['method']} | {r['count']} "
            f"| {r['gradients_per_product']:.2f} ({low:.2f}..{high:.2f}) "
            f"| {r['peak_mib'] / 1024:.1f} "
            f"| {r['relative_error']:.0e}{' **wrong**' if r['wrong'] else ''} |"
        )


def report(found: Row) -> str:
    lines: list[str] = []
    if "results" in found:
        lines += [*update_table(found["results"]), ""]
        wrong = [r for r in found["results"] if r["wrong"]]
        lines += [f"{r['set']}, {r['variant']}, {r['method']}: {r['wrong']}\n" for r in wrong]
    if "op" in found:
        lines += [*op_table(found["op"]), "", *products_table(found["products"]), ""]
    rate = f"; a GEMM at {found['gemm_gflops'] / 1e3:.0f} TFLOP/s" if "gemm_gflops" in found else ""
    lines.append(
        f"{found['device']}; torch {found['torch']}, CUDA {found['cuda']}, Python "
        f"{found['python']}; commit {found['commit']}; a copy at {found['copy_gb_per_s']:.0f} GB/s"
        f"{rate}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        text = report(json.loads(path.read_text()))
        path.with_suffix(".md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
