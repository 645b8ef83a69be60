"""Make Markdown tables of the update benchmark's JSON.

python benchmarks/compare.py RESULT.json [RESULT.json ...] [--targets] [--save NAME]

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

BASE = "torch fused"
# Ratios to torch's fused AdamW on the ResNet-50 set at two threads that the project set itself.
TARGETS = {
    "ours: AdamW": 0.90,
    "ours: + anchor": 1.05,
    "ours: + anchor + curvature + norms": 1.25,
    "ours: whole job": 1.45,
    "ours: whole job, bf16 state": 1.00,
}
FLOOR_TARGET = 1.10
SMALL_TARGET = 0.33
# How many times slower than the whole job what the user writes for it has to be.
USER, USER_TARGETS = "user: clip + EWC + drift + update norm", {"": 4.0, ", bf16 state": 5.0}


def read(path: Path) -> list[dict[str, Any]]:
    """`extra_info` of each benchmark with `ms`, its median wall time, and the machine's name."""
    data = json.loads(path.read_text())
    if "rows" in data:
        return list(data["rows"])
    name = machine(data["machine_info"])
    rows = [
        b["extra_info"] | {"ms": b["stats"]["median"] * 1e3, "group": b["group"], "machine": name}
        for b in data["benchmarks"]
        if "to_fused" in b["extra_info"]
    ]
    return [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


def machine(info: dict[str, Any]) -> str:
    cpu = info.get("cpu", {})
    return (
        f"{cpu.get('brand_raw', info['processor'])}, {cpu.get('count', '?')} cores; Python "
        f"{info['python_version']}, torch {info['torch']}, {info['native']}; commit "
        f"{info['commit']}{' with changes' if info['changed'] else ''}"
    )


def conditions(row: dict[str, Any]) -> str:
    which = "quiet" if row["only_quiet"] else "no quiet enough, all used"
    return (
        f"{row['machine']}; {row['threads']} threads; {row['rounds']} rounds, "
        f"{row['quiet_rounds']} quiet ({which}); other processes took {row['others']:.0%} of a core"
    )


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    first = rows[0]
    yield f"### {first['group']}"
    yield ""
    yield f"{first['tensors']} tensors, {first['elements'] / 1e6:.2f}M elements."
    yield ""
    yield (
        "| method | B/param moved (read) | ms | x fused | CPU time x fused | GB/s moved (read) | "
        "x floor | CPU time x floor |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in rows:
        floor = [f"{r[key]:.2f}" if key in r else "-" for key in ("to_floor", "cpu_to_floor")]
        yield (
            f"| {r['method']} | {r['bytes_moved']} ({r['bytes_read']}) | {r['ms']:.1f} "
            f"| {r['to_fused']:.2f} | {r['cpu_to_fused']:.2f} "
            f"| {r['gb_moved_per_s']:.1f} ({r['gb_read_per_s']:.1f}) | {floor[0]} | {floor[1]} |"
        )


def promises(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What was promised beside what was measured; by wall time."""

    def line(what: str, bound: str, value: float, met: bool) -> str:
        return f"| {what} | {bound} | {value:.2f} | {'yes' if met else 'no'} |"

    yield "| promise | bound | measured | met |"
    yield "| --- | --- | --- | --- |"
    sets: dict[str, dict[str, dict[str, Any]]] = {}
    for r in rows:
        sets.setdefault(r["set"], {})[r["method"]] = r
    resnet = sets.get("resnet50", {})
    for method, bound in TARGETS.items():
        if method in resnet:
            value = resnet[method]["to_fused"]
            yield line(f"resnet50, {method}", f"<= {bound} x fused", value, value <= bound)
    for method, r in resnet.items():
        if method.startswith("ours") and "to_floor" in r:
            value = r["to_floor"]
            bound = f"<= {FLOOR_TARGET} x floor"
            yield line(f"resnet50, {method}", bound, value, value <= FLOOR_TARGET)
    for storage, bound in USER_TARGETS.items():
        if USER in resnet and (ours := resnet.get(f"ours: whole job{storage}")):
            value = resnet[USER]["to_fused"] / ours["to_fused"]
            yield line(f"resnet50, the user's way / whole job{storage}", f">= {bound}", value,
                       value >= bound)  # fmt: skip
    if "DeepSpeed CPUAdam" in resnet and "ours: AdamW" in resnet:
        value = resnet["DeepSpeed CPUAdam"]["to_fused"] / resnet["ours: AdamW"]["to_fused"]
        yield line("resnet50, DeepSpeed CPUAdam / ours", "> 1", value, value > 1)
    if small := sets.get("small_2000", {}).get("ours: whole job"):
        value = small["to_fused"]
        bound = f"<= {SMALL_TARGET} x fused"
        yield line("small_2000, ours: whole job", bound, value, value <= SMALL_TARGET)


def report(rows: list[dict[str, Any]], targets: bool) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    lines: list[str] = []
    for found in groups.values():
        lines += [*table(found), "", conditions(found[0]), ""]
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
