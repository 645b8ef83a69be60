"""Tables of the measurements of kernels and curvature products, from their JSON.

    python -m benchmarks.report RESULT.json [RESULT.json ...] [--targets] [--save NAME]

It reads what `pytest --benchmark --benchmark-json=RESULT.json` and the scripts for a GPU wrote.
`--save NAME` keeps what the tables are made of, and the tables, as `benchmarks/results/NAME.json`
and `.md`; the kept file can be read again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import RESULTS, Record, save
from benchmarks.curvature import tables as curvature
from benchmarks.kernels import tables as kernels


def read(path: Path) -> list[Record]:
    """One row per measurement: its `extra_info`, median `ms`, group, threads and machine."""
    data = json.loads(path.read_text())
    if "rows" in data:
        return list(data["rows"])
    info = data["machine_info"]
    where = {"machine": machine(info), "threads": info["threads"]}
    rows = [
        b["extra_info"] | {"ms": b["stats"]["median"] * 1e3, "group": b["group"]} | where
        for b in data["benchmarks"]
        if b["extra_info"]
    ]
    return [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


def machine(info: Record) -> str:
    cpu = info.get("cpu", {})
    return (
        f"{cpu.get('brand_raw', info['processor'])}, {cpu.get('count', '?')} cores; Python "
        f"{info['python_version']}, torch {info['torch']}, {info['native']}; commit "
        f"{info['commit']}{' with changes' if info['changed'] else ''}"
    )


def report(rows: list[Record], targets: bool) -> list[str]:
    """The tables of either benchmark, each with what its figures belong to."""
    tables = kernels if "to_fused" in rows[0] else curvature
    lines = tables.report(rows)
    if targets:
        lines += [*tables.promises(rows), ""]
    return lines[:-1]


def gpu_report(data: Record) -> Iterable[str]:
    """The tables of what a script for a GPU wrote."""
    yield from kernels.gpu_tables(data) if "results" in data else curvature.gpu_tables(data)
    rate = f"; a GEMM at {data['gemm_gflops'] / 1e3:.0f} TFLOP/s" if "gemm_gflops" in data else ""
    yield (
        f"{data['device']}; torch {data['torch']}, CUDA {data['cuda']}, Python "
        f"{data['python']}; commit {data['commit']}; a copy at {data['copy_gb_per_s']:.0f} GB/s"
        f"{rate}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--targets", action="store_true", help="what was promised, and is it met")
    parser.add_argument("--save", metavar="NAME", help="of the files in benchmarks/results/")
    args = parser.parse_args()
    first = json.loads(args.results[0].read_text())
    if "device" in first:
        lines, kept = list(gpu_report(first)), json.dumps(first, indent=1)
    else:
        rows = [row for path in args.results for row in read(path)]
        lines = report(rows, args.targets)
        kept = '{"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}"
    if args.save:
        save(args.save, lines)
        (RESULTS / f"{args.save}.json").write_text(kept + "\n")
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
