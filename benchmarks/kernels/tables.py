"""Tables of the update benchmark, for `benchmarks.report`."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.common import Record, table

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
# The same work written by a user has to be so many times slower than ours.
USER, USER_TARGETS = "user: clip + EWC + drift + update norm", {"": 4.0, ", bf16 state": 5.0}


def conditions(row: Record) -> str:
    which = "quiet" if row["only_quiet"] else "no quiet enough, all used"
    return (
        f"{row['machine']}; {row['threads']} threads; {row['rounds']} rounds, "
        f"{row['quiet_rounds']} quiet ({which}); other processes took {row['others']:.0%} of a core"
    )


def report(rows: list[Record]) -> list[str]:
    """A table per set of tensors."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    lines: list[str] = []
    for name, group in groups.items():
        cells = [
            {
                "method": r["method"],
                "B/param moved (read)": f"{r['bytes_moved']} ({r['bytes_read']})",
                "ms": f"{r['ms']:.1f}",
                "x fused": f"{r['to_fused']:.2f}",
                "CPU time x fused": f"{r['cpu_to_fused']:.2f}",
                "GB/s moved (read)": f"{r['gb_moved_per_s']:.1f} ({r['gb_read_per_s']:.1f})",
                "x floor": f"{r['to_floor']:.2f}" if "to_floor" in r else "-",
                "CPU time x floor": f"{r['cpu_to_floor']:.2f}" if "to_floor" in r else "-",
            }
            for r in group
        ]
        size = f"{group[0]['tensors']} tensors, {group[0]['elements'] / 1e6:.2f}M elements."
        lines += [f"### {name}", "", size, "", *table(cells), "", conditions(group[0]), ""]
    return lines


def promises(rows: list[Record]) -> list[str]:
    """What was promised beside what was measured, by wall time."""
    by_set: dict[str, dict[str, float]] = defaultdict(dict)
    for r in rows:
        by_set[r["set"]][r["method"]] = r["to_fused"]
    resnet, small = by_set["resnet50"], by_set["small_2000"]
    cells = []

    def promise(what: str, bound: str, value: float, met: bool) -> None:
        cells.append(
            {
                "promise": what,
                "bound": bound,
                "measured": f"{value:.2f}",
                "met": "yes" if met else "no",
            }
        )

    for method, most in TARGETS.items():
        if value := resnet.get(method):
            promise(f"resnet50, {method}", f"<= {most} x fused", value, value <= most)
    for r in rows:
        if r["set"] == "resnet50" and r["method"].startswith("ours") and "to_floor" in r:
            promise(f"resnet50, {r['method']}", f"<= {FLOOR_TARGET} x floor", r["to_floor"],
                    r["to_floor"] <= FLOOR_TARGET)  # fmt: skip
    for storage, least in USER_TARGETS.items():
        if USER in resnet and (ours := resnet.get(f"ours: whole job{storage}")):
            ratio = resnet[USER] / ours
            promise(f"resnet50, the user's way / whole job{storage}", f">= {least}", ratio,
                    ratio >= least)  # fmt: skip
    if "DeepSpeed CPUAdam" in resnet and "ours: AdamW" in resnet:
        ratio = resnet["DeepSpeed CPUAdam"] / resnet["ours: AdamW"]
        promise("resnet50, DeepSpeed CPUAdam / ours", "> 1", ratio, ratio > 1)
    if value := small.get("ours: whole job"):
        bound = f"<= {SMALL_TARGET} x fused"
        promise("small_2000, ours: whole job", bound, value, value <= SMALL_TARGET)
    return table(cells)


def gpu_tables(data: Record) -> list[str]:
    """Every backend and torch's plain AdamW, by set and variant: ms and share of a copy."""
    rows = data["results"]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    texts = {
        (r["set"], r["variant"], r["method"]): f"{r['ms']:.3f} ms, {r['of_copy']:.0%}" for r in rows
    }
    cells = [
        {"set": name, "variant": variant}
        | {method: texts[name, variant, method] for method in methods}
        for name, variant in dict.fromkeys((r["set"], r["variant"]) for r in rows)
    ]
    wrong = [
        f"{r['set']}, {r['variant']}, {r['method']}: {r['wrong']}\n" for r in rows if r["wrong"]
    ]
    return [*table(cells), "", *wrong]
