"""Tables of the curvature benchmark, for `benchmarks.report`."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.common import Record, table

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


def is_time(row: Record) -> bool:
    return "gradients_per_product" in row


def ratio(row: Record) -> str:
    """Gradients per product, and their range."""
    low, high = row["range"]
    return f"{row['gradients_per_product']:.2f} ({low:.2f}..{high:.2f})"


def error(row: Record) -> str:
    return f"{row['relative_error']:.0e}{' **wrong**' if row['wrong'] else ''}"


def report(rows: list[Record]) -> list[str]:
    """A table per network and matrix, with a row per method and K."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["case"], row["kind"]].append(row)
    lines: list[str] = []
    for (case, kind), group in groups.items():
        peaks = {
            (r["method"], r["count"]): f"{r['peak_mib']:.0f}" for r in group if "peak_mib" in r
        }
        cells = [
            {
                "method": r["method"],
                "K": r["count"],
                "gradients per product (range)": ratio(r),
                "ms per product": f"{r['ms'] / r['count']:.1f}",
                "x floor": f"{r['ms'] / r['floor_ms']:.2f}",
                "error in float64": error(r),
                "peak MiB": peaks.get((r["method"], r["count"]), "-"),
            }
            for r in sorted(filter(is_time, group), key=lambda r: (r["count"], r["method"] != OURS))
        ]
        lines += [f"### {case}, {kind}", "", *table(cells), ""]
    for name, threads in dict.fromkeys((r["machine"], r["threads"]) for r in rows):
        rates = [r["gemm_gflops"] for r in rows if r["machine"] == name and "gemm_gflops" in r]
        best = f"; a plain GEMM at up to {max(rates):.0f} GFLOP/s" if rates else ""
        lines += [f"{name}; {threads} threads{best}.", ""]
    return lines


def promises(rows: list[Record]) -> list[str]:
    """What was promised beside what was measured."""
    cells = []

    def promise(what: str, value: float, bound: float) -> None:
        cells.append(
            {
                "promise": what,
                "bound": f"{bound:g}",
                "measured": f"{value:.2f}",
                "met": "yes" if value <= bound else "no",
            }
        )

    times = {
        (r["case"], r["kind"], r["count"], r["method"]): r["gradients_per_product"]
        for r in filter(is_time, rows)
    }
    for (case, kind, count), bound in TARGETS.items():
        if value := times.get((case, kind, count, OURS)):
            promise(f"{case}, {kind}, K = {count}: gradients per product", value, bound)
    for (case, count), bound in MEMORY_TARGETS.items():
        for r in rows:
            if "peak_mib" in r and (r["case"], r["count"], r["method"]) == (case, count, OURS):
                promise(f"{case}, {r['kind']}, K = {count}: peak MiB", r["peak_mib"], bound)
    for (case, kind, count, method), loop in times.items():
        ours = times.get((case, kind, count, OURS))
        if method == LOOP and ours is not None:
            promise(f"{case}, {kind}, K = {count}: auto / {LOOP}", ours / loop, NEVER_SLOWER)
    return table(cells)


def gpu_tables(data: Record) -> list[str]:
    """The bandwidth of the op, and the products of every method."""
    op = [
        {
            "op": r["op"],
            "vectors, rows, classes": f"{r['count']}, {r['rows']}, {r['classes']}",
            "dtype": r["dtype"].removeprefix("torch."),
            "ms": f"{r['ms']:.3f}",
            "of a copy": f"{r['of_copy']:.0%}",
        }
        for r in data["op"]
    ]
    products = [
        {
            "case": f"{r['case']} {r['kind']}",
            "method": r["method"],
            "K": r.get("count", ""),
            "gradients per product (range)": r["failed"][:60] if "failed" in r else ratio(r),
            "peak GiB": "" if "failed" in r else f"{r['peak_mib'] / 1024:.1f}",
            "error in float64": "" if "failed" in r else error(r),
        }
        for r in data["products"]
    ]
    return [*table(op), "", *table(products), ""]
