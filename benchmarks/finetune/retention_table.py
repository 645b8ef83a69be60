"""From the records of `retention.py` to its two tables: every method, and FAST by its figures."""

from __future__ import annotations

import math
from statistics import correlation, mean, stdev

from benchmarks.finetune.finetune_table import Records, curve, final, steps_to

NAME = "fast"


def chosen_runs(records: Records, pair: str, method: str) -> Records:
    """The runs at the learning rate with the better final target accuracy on the first seed."""
    runs = [r for r in records if r["pair"] == pair and r["method"] == method]
    first = min(r["seed"] for r in runs)
    tried = {r["lr"]: r["history"][-1]["target_accuracy"] for r in runs if r["seed"] == first}
    lr = max(tried, key=lambda rate: tried[rate])
    return [r for r in runs if r["lr"] == lr]


def best_baseline(methods: dict[str, Records]) -> str:
    """The baseline with the highest mean final target accuracy."""
    baselines = [m for m in methods if not m.startswith(NAME)]
    return max(baselines, key=lambda m: final(methods[m], "target_accuracy"))


def lost(runs: Records) -> float:
    """Source accuracy lost, mean over seeds."""
    return mean(r["source_before"] for r in runs) - final(runs, "source_accuracy")


def forecasts(records: Records) -> dict[str, list[tuple[float, float]]]:
    """(forecast, measured) rises of the source loss, nats, at the ends of runs and on the way."""
    pairs: dict[str, list[tuple[float, float]]] = {"at the end": [], "on the way": []}
    for r in records:
        start, *between, end = r["history"]
        for where, rows in (("at the end", [end]), ("on the way", between)):
            pairs[where] += [
                (row["forecast"], row["source_loss"] - start["source_loss"])
                for row in rows
                if row["source_loss"] is not None and row["forecast"] is not None
            ]
    return pairs


def _forecast_lines(records: Records) -> list[str]:
    lines = []
    for where, pairs in forecasts(records).items():
        if len(pairs) < 3:
            continue
        sides = list(zip(*pairs, strict=True))
        logs = [[math.log(max(x, 1e-6)) for x in side] for side in sides]
        lines += [
            "",
            f"Forecast against measured rise of the source loss {where}, {len(pairs)} pairs: "
            f"correlation {correlation(*sides):.2f}, of their logarithms {correlation(*logs):.2f}.",
        ]
    return lines


def report(records: Records) -> str:
    """Markdown."""
    by_pair: dict[str, dict[str, Records]] = {}
    for pair in dict.fromkeys(r["pair"] for r in records):
        names = dict.fromkeys(r["method"] for r in records if r["pair"] == pair)
        by_pair[pair] = {m: chosen_runs(records, pair, m) for m in names}
    lines = [*_methods(by_pair), "", *_figures(by_pair)]
    lines += _forecast_lines(records)
    commits = ", ".join(sorted({r["commit"] for r in records}))
    machines = dict.fromkeys(r["pair"] + ": " + r["machine"] for r in records)
    lines += ["", f"Means over seeds. Commit {commits}.", *(f"\n{m}" for m in machines)]
    return "\n".join(lines) + "\n"


def _methods(by_pair: dict[str, dict[str, Records]]) -> list[str]:
    lines = [
        "| pair | method, lr | seeds | target accuracy | source accuracy | rise of source loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for pair, methods in by_pair.items():
        for method in sorted(methods, key=lambda m: not m.startswith(NAME)):
            runs = methods[method]
            finals = [100 * r["history"][-1]["target_accuracy"] for r in runs]
            spread = f" ± {stdev(finals):.1f}" if len(finals) > 1 else ""
            before = mean(r["source_before"] for r in runs)
            source_loss = curve(runs, "source_loss")
            rise = f"{source_loss[-1][1] - source_loss[0][1]:.2f}" if source_loss else "-"
            lines.append(
                f"| {pair} | {method}, {runs[0]['lr']:g} | {len(runs)} "
                f"| {mean(finals):.1f}{spread} % "
                f"| {100 * before:.1f} -> {100 * final(runs, 'source_accuracy'):.1f} % | {rise} |"
            )
    return lines


def _figures(by_pair: dict[str, dict[str, Records]]) -> list[str]:
    variants = dict.fromkeys(m for ms in by_pair.values() for m in ms if m.startswith(NAME))
    lines = [
        "| method | pair | best baseline | steps to its final target accuracy, share of its steps "
        "| final target minus its, points | source accuracy lost, points: ours / its | share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in variants:
        rows = []
        for pair, methods in by_pair.items():
            if variant not in methods or all(m.startswith(NAME) for m in methods):
                continue
            name = best_baseline(methods)
            best, runs = methods[name], methods[variant]
            goal = final(best, "target_accuracy")
            steps = steps_to(runs, goal)
            # Not reached counts as the whole run.
            share = (steps or best[0]["history"][-1]["step"]) / best[0]["history"][-1]["step"]
            ahead = 100 * (final(runs, "target_accuracy") - goal)
            ours, its = 100 * lost(runs), 100 * lost(best)
            rows.append((share, ahead, ours, its))
            reached = f"{share:.2f}" if steps else "not reached"
            gone = f"{ours / its:.2f}" if its > 0 else "-"
            lines.append(
                f"| {variant} | {pair} | {name} | {reached} | {ahead:+.1f} "
                f"| {ours:.1f} / {its:.1f} | {gone} |"
            )
        if rows:
            share, ahead, ours, its = (mean(column) for column in zip(*rows, strict=True))
            shares = [o / i for _, _, o, i in rows if i > 0]
            lines.append(
                f"| {variant} | **mean** (wanted: 0.5, -0.5, 0.25) | | **{share:.2f}** "
                f"| **{ahead:+.1f}** | **{ours:.1f} / {its:.1f}** "
                f"| **{mean(shares):.2f}**, of the means {ours / its:.2f} |"
            )
    return lines
