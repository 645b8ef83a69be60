"""From the records of fine-tuning runs to the table that the README and the results show."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean
from typing import Any

Records = list[dict[str, Any]]


def curve(runs: Records, key: str) -> list[tuple[int, float]]:
    """Mean over seeds of one figure of the history, as (step, value)."""
    points = defaultdict(list)
    for run in runs:
        for record in run["history"]:
            if record[key] is not None:
                points[record["step"]].append(record[key])
    return [(step, mean(values)) for step, values in sorted(points.items())]


def final(runs: Records, key: str) -> float:
    return curve(runs, key)[-1][1]


def steps_to(runs: Records, accuracy: float) -> int | None:
    """First evaluated step at which the mean target accuracy is reached, or None."""
    return next((s for s, a in curve(runs, "target_accuracy") if s and a >= accuracy), None)


def best_rate(records: Records, pair: str, method: str) -> Records:
    """The runs of a method on a pair at its better learning rate, by final target accuracy."""
    by_rate = defaultdict(list)
    for r in records:
        if r["pair"] == pair and r["method"] == method:
            by_rate[r["lr"]].append(r)
    return max(by_rate.values(), key=lambda runs: final(runs, "target_accuracy"))


def table(records: Records, machine: str) -> str:
    """Markdown: one row per pair and method, with what the method is judged by against vanilla."""
    lines = [
        "| pair | method, lr | seeds | target accuracy | source accuracy "
        "| lost, share of vanilla's | steps to vanilla's final target, share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in dict.fromkeys(r["pair"] for r in records):
        vanilla = best_rate(records, pair, "vanilla")
        goal = final(vanilla, "target_accuracy")
        before = mean(r["source_before"] for r in vanilla)
        lost = before - final(vanilla, "source_accuracy")
        methods = dict.fromkeys(r["method"] for r in records if r["pair"] == pair)
        for method in sorted(methods, key=lambda m: m != "fast"):
            runs = best_rate(records, pair, method)
            steps = steps_to(runs, goal)
            total = runs[0]["history"][-1]["step"]
            share = (before - final(runs, "source_accuracy")) / lost if lost else float("nan")
            reached = "not reached" if steps is None else f"{steps / total:.2f}"
            lines.append(
                f"| {pair} | {method}, {runs[0]['lr']:g} | {len(runs)} "
                f"| {100 * final(runs, 'target_accuracy'):.1f} % "
                f"| {100 * before:.1f} -> {100 * final(runs, 'source_accuracy'):.1f} % "
                f"| {share:.2f} | {reached} |"
            )
    commits = ", ".join(sorted({r["commit"] for r in records}))
    lines += ["", f"Means over seeds. {machine}. Commit {commits}."]
    return "\n".join(lines) + "\n"
