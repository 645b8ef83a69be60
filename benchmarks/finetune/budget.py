"""Is a forgetting budget kept, and used? FAST on five real pairs, as one table.

    python benchmarks/budget.py --data FOLDER

What is forgotten is measured on labelled source test data that the run never sees; the run gets a
few hundred other source inputs, of which it holds half back for its own checks. Finished runs are
kept in `benchmarks/results/budget.jsonl` and not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import correlation, mean
from typing import Any

from benchmarks.common import RESULTS, machine
from benchmarks.finetune.runs import Task, complete, learning_rates, parse
from fast.adapt.config import Budget

# MiniLM has no source head, so it has no source loss: what it knows is counted as the accuracy by
# nearest class mean, and its budgets are points.
POINTS = ("minilm -> sst2",)
PAIRS = (
    "resnet20 -> gtsrb,resnet20 -> sign_digits,resnet32 -> fashion_mnist,"
    "mobilenet 0.25 -> flowers,minilm -> sst2"
)
FREE = "fast"
# Evaluating is no part of what is measured.
EVALUATIONS = 2
INSIDE = (0.5, 1.5)


def specs(pair: str, nats: str, points: str) -> list[str]:
    """`fast` with each budget, and without."""
    amounts = [f"'{p}%'" for p in points.split(",")] if pair in POINTS else nats.split(",")
    return [*(f"{FREE}:forget_budget={amount}" for amount in amounts), FREE]


def lost(record: dict[str, Any]) -> float:
    """What the run has forgotten, in the unit of its budget; of a free run, of its pair's."""
    start, end = record["history"][0], record["history"][-1]
    budget = parse(record["method"])[1].get("forget_budget")
    points = Budget.parse(budget).points if budget else record["pair"] in POINTS
    if points:
        return record["source_before"] - end["source_accuracy"]
    return end["source_loss"] - start["source_loss"]


def report(records: list[dict[str, Any]], machine: str) -> str:
    """Markdown."""
    lines = [
        "| pair | budget | seeds | lost without it | lost on test data | over the budget "
        "| lost on held-back inputs | target accuracy, without it and with it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    kept: dict[str, list[bool]] = {}
    for pair in dict.fromkeys(r["pair"] for r in records):
        runs = [r for r in records if r["pair"] == pair]
        free = [r for r in runs if r["method"] == FREE]
        without = f"{mean(map(lost, free)):.3f}" if free else "-"
        aim = f"{target(free):.1f}" if free else "-"
        for spec in dict.fromkeys(r["method"] for r in runs if r["method"] != FREE):
            chosen = [r for r in runs if r["method"] == spec]
            budget = Budget.parse(parse(spec)[1]["forget_budget"])
            ratios = [lost(r) / budget.amount for r in chosen]
            kept.setdefault(pair, []).append(INSIDE[0] <= mean(ratios) <= INSIDE[1])
            spread = f" ({min(ratios):.2f}..{max(ratios):.2f})" if len(ratios) > 1 else ""
            held = mean(r["history"][-1]["forecast"] for r in chosen)
            lines.append(
                f"| {pair} | {budget} | {len(chosen)} | {without} "
                f"| {mean(map(lost, chosen)):.3f} | **{mean(ratios):.2f}**{spread} | {held:.3f} "
                f"| {aim}, {target(chosen):.1f} % |"
            )
    whole = sum(all(inside) for inside in kept.values())
    lines += [
        "",
        f"Lost, over the budget: between {INSIDE[0]} and {INSIDE[1]} at every budget on {whole} of "
        f"{len(kept)} pairs; in {sum(map(sum, kept.values()))} of {sum(map(len, kept.values()))} "
        "rows.",
    ]
    known = [r for r in records if r["pair"] not in POINTS]
    if len(known) > 2:
        r = correlation([r["history"][-1]["forecast"] for r in known], [lost(r) for r in known])
        lines.append(
            f"Forecast at the end against measured rise of the source loss, {len(known)} runs, "
            f"with budgets and without: correlation {r:.2f}."
        )
    commits = ", ".join(sorted({r["commit"] for r in records}))
    lines += ["", f"Nats of source loss, or points of accuracy (0..1). {machine}. {commits}."]
    return "\n".join(lines) + "\n"


def target(records: list[dict[str, Any]]) -> float:
    """Final target accuracy, mean over runs, per cent."""
    return 100 * mean(r["history"][-1]["target_accuracy"] for r in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=PAIRS, help="names, separated by commas")
    parser.add_argument("--nats", default="0.1,0.3", help="budgets of pairs with a source head")
    parser.add_argument("--points", default="5,10", help="budgets of the others, per cent")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="budget", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    pairs, data = args.pairs.split(","), args.data.resolve()
    tasks = [
        Task(
            pair, spec, learning_rates(spec, True)[0], seed, data, True, EVALUATIONS, labelled=True
        )
        for seed in map(int, args.seeds.split(","))
        for pair in pairs
        for spec in specs(pair, args.nats, args.points)
    ]
    tasks.sort(key=lambda task: (task.seed, task.spec == FREE))  # what counts comes first
    records = complete(tasks, RESULTS / f"{args.name}.jsonl", args.workers)
    text = report([r for r in records if r["pair"] in pairs], machine())
    (RESULTS / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
