"""Is a forgetting budget kept, and used? FAST on five real pairs, as one table.

    python -m benchmarks.finetune.budget --data FOLDER

What is forgotten is measured on labelled source test data that the run never sees; the run gets a
few hundred other source inputs, of which it holds half back for its own checks. Finished runs are
kept in `benchmarks/results/budget.jsonl` and not run again.
"""

from __future__ import annotations

from statistics import correlation, mean

from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.figures import Runs
from benchmarks.finetune.runs import learning_rates, parse, run
from benchmarks.real_pairs import README_PAIRS
from fast.adapt.config import Budget

# MiniLM has no source head, so it has no source loss: what it knows is counted as the accuracy by
# nearest class mean, and its budgets are points.
POINTS = ("minilm -> sst2",)
FREE = "fast"
# An evaluation is no part of what is measured.
EVALUATIONS = {"fast": 2}
INSIDE = (0.5, 1.5)


def lost(record: Record) -> float:
    """What the run has forgotten, in the unit of its budget, or of its pair's budgets."""
    start, end = record["history"][0], record["history"][-1]
    budget = parse(record["method"])[1].get("forget_budget")
    points = Budget.parse(budget).points if budget else record["pair"] in POINTS
    if points:
        return record["source_before"] - end["source_accuracy"]
    return end["source_loss"] - start["source_loss"]


def target(records: Runs) -> float:
    """Final target accuracy, mean over runs, per cent."""
    return 100 * mean(r["history"][-1]["target_accuracy"] for r in records)


def report(records: Runs) -> list[str]:
    rows = []
    kept: dict[str, list[bool]] = {}
    for pair in dict.fromkeys(r["pair"] for r in records):
        of_pair = [r for r in records if r["pair"] == pair]
        free = [r for r in of_pair if r["method"] == FREE]
        without = f"{mean(map(lost, free)):.3f}" if free else "-"
        accuracy = f"{target(free):.1f}" if free else "-"
        for method in dict.fromkeys(r["method"] for r in of_pair if r["method"] != FREE):
            runs = [r for r in of_pair if r["method"] == method]
            budget = Budget.parse(parse(method)[1]["forget_budget"])
            ratios = [lost(r) / budget.amount for r in runs]
            kept.setdefault(pair, []).append(INSIDE[0] <= mean(ratios) <= INSIDE[1])
            forecast = mean(r["history"][-1]["forecast"] for r in runs)
            spread = f" ({min(ratios):.2f}..{max(ratios):.2f})" if len(ratios) > 1 else ""
            rows.append(
                {
                    "pair": pair,
                    "budget": budget,
                    "seeds": len(runs),
                    "lost without it": without,
                    "lost on test data": f"{mean(map(lost, runs)):.3f}",
                    "over the budget": f"**{mean(ratios):.2f}**{spread}",
                    "lost on held-back inputs": f"{forecast:.3f}",
                    "target accuracy, without it and with it": f"{accuracy}, {target(runs):.1f} %",
                }
            )
    whole = sum(all(inside) for inside in kept.values())
    lines = [
        *table(rows),
        "",
        f"Lost, over the budget: between {INSIDE[0]} and {INSIDE[1]} at every budget on {whole} of "
        f"{len(kept)} pairs; in {sum(map(sum, kept.values()))} of {sum(map(len, kept.values()))} "
        "rows.",
    ]
    in_nats = [r for r in records if r["pair"] not in POINTS]
    if len(in_nats) > 2:
        r = correlation([r["history"][-1]["forecast"] for r in in_nats], list(map(lost, in_nats)))
        lines.append(
            f"Forecast at the end against measured rise of the source loss, {len(in_nats)} runs, "
            f"with budgets and without: correlation {r:.2f}."
        )
    unit = "Nats of source loss, or points of accuracy (0..1)."
    return [*lines, "", f"{unit} {machine()}. {commits(records)}."]


def main() -> None:
    parser = arguments(__doc__, README_PAIRS)
    parser.add_argument("--nats", default="0.1,0.3", help="budgets of pairs with a source head")
    parser.add_argument("--points", default="5,10", help="budgets of the others, per cent")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="budget", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    def budgets(pair: str) -> list[str]:
        if pair in POINTS:
            return [f"'{points}%'" for points in args.points.split(",")]
        return args.nats.split(",")

    pairs = args.pairs.split(",")
    settings = [
        {"pair": pair, "method": method, "lr": learning_rates(method)[0], "seed": int(seed)}
        for seed in args.seeds.split(",")
        for pair in pairs
        for method in (*(f"{FREE}:forget_budget={budget}" for budget in budgets(pair)), FREE)
    ]
    # The runs with a budget come first: the free ones only say what it saved.
    settings.sort(key=lambda setting: (setting["seed"], setting["method"] == FREE))
    records = complete(
        args.name,
        run,
        settings,
        args.workers,
        data=args.data.resolve(),
        evaluations=EVALUATIONS,
        with_source_inputs=True,
        with_source_labels=True,
    )
    save(args.name, report([r for r in records if r["pair"] in pairs]))


if __name__ == "__main__":
    main()
