"""Does FAST forget almost nothing? Every method on five real pairs, as two tables.

    python -m benchmarks.finetune.retention --data FOLDER

All methods get the same few hundred source inputs and the same number of steps. FAST runs at its
defaults; every baseline at the better of two learning rates, by final target accuracy on the first
seed. Finished runs are kept in `benchmarks/results/retention.jsonl` and not run again.

Variants of a method, on one seed, into files of their own:

    python -m benchmarks.finetune.retention --data FOLDER --name tried --seeds 0 \\
        --pairs "resnet20 -> gtsrb" --methods fast,fast:distill=0.1
"""

from __future__ import annotations

import math
from statistics import correlation, mean, stdev
from typing import NamedTuple

from benchmarks.common import arguments, commits, complete, save, table
from benchmarks.finetune.figures import (
    Runs,
    best_rate,
    curve,
    final,
    lost,
    source_change,
    steps_to,
)
from benchmarks.finetune.runs import learning_rates, rate, run
from benchmarks.real_pairs import README_PAIRS

METHODS = "fast,vanilla,lp-ft,l2-sp,ewc,replay"
NAME = "fast"
# The tables use the end of a baseline and two forecasts on the way: evaluating it as often as FAST
# would take as long as its run.
EVALUATIONS = dict.fromkeys(("vanilla", "lp-ft", "l2-sp", "ewc", "replay"), 3)
Methods = dict[str, Runs]


def best_baseline(methods: Methods) -> str:
    """The baseline with the highest mean final target accuracy."""
    baselines = [m for m in methods if not m.startswith(NAME)]
    return max(baselines, key=lambda m: final(methods[m], "target_accuracy"))


def accuracies(by_pair: dict[str, Methods]) -> list[str]:
    """The table of every method on every pair."""
    rows = []
    for pair, methods in by_pair.items():
        for method in sorted(methods, key=lambda m: not m.startswith(NAME)):
            runs = methods[method]
            targets = [100 * r["history"][-1]["target_accuracy"] for r in runs]
            spread = f" ± {stdev(targets):.1f}" if len(targets) > 1 else ""
            loss = curve(runs, "source_loss")
            rows.append(
                {
                    "pair": pair,
                    "method, lr": f"{method}, {rate(runs)}",
                    "seeds": len(runs),
                    "target accuracy": f"{mean(targets):.1f}{spread} %",
                    "source accuracy": source_change(runs),
                    "rise of source loss": f"{loss[-1][1] - loss[0][1]:.2f}" if loss else "-",
                }
            )
    return table(rows)


class Beside(NamedTuple):
    """Runs of ours beside those of a baseline.

    Attributes:
        share: steps to the baseline's final target accuracy, as a share of its steps; a goal that
            is not reached counts as the whole run.
        ahead: final target accuracy minus the baseline's, points.
        ours, its: source accuracy lost, points.
    """

    share: float
    ahead: float
    ours: float
    its: float

    @classmethod
    def of(cls, runs: Runs, best: Runs) -> Beside:
        goal, whole = final(best, "target_accuracy"), best[0]["history"][-1]["step"]
        share = (steps_to(runs, goal) or whole) / whole
        ahead = 100 * (final(runs, "target_accuracy") - goal)
        return cls(share, ahead, 100 * lost(runs), 100 * lost(best))


def against_baselines(by_pair: dict[str, Methods]) -> list[str]:
    """The table of FAST and its variants, each beside the best baseline of the pair."""
    columns = (
        "method", "pair", "best baseline", "steps to its final target accuracy, share of its steps",
        "final target minus its, points", "source accuracy lost, points: ours / its", "share",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    variants = dict.fromkeys(m for ms in by_pair.values() for m in ms if m.startswith(NAME))
    for variant in variants:
        figures = []
        for pair, methods in by_pair.items():
            if variant not in methods or all(m.startswith(NAME) for m in methods):
                continue
            name = best_baseline(methods)
            best, runs = methods[name], methods[variant]
            share, ahead, ours, its = beside = Beside.of(runs, best)
            figures.append(beside)
            reached = steps_to(runs, final(best, "target_accuracy")) is not None
            rows.append((
                variant, pair, name, f"{share:.2f}" if reached else "not reached", f"{ahead:+.1f}",
                f"{ours:.1f} / {its:.1f}", f"{ours / its:.2f}" if its > 0 else "-",
            ))  # fmt: skip
        if figures:
            share, ahead, ours, its = (mean(column) for column in zip(*figures, strict=True))
            shares = mean(f.ours / f.its for f in figures if f.its > 0)
            rows.append((
                variant, "**mean** (wanted: 0.5, -0.5, 0.25)", "", f"**{share:.2f}**",
                f"**{ahead:+.1f}**", f"**{ours:.1f} / {its:.1f}**",
                f"**{shares:.2f}**, of the means {ours / its:.2f}",
            ))  # fmt: skip
    return table(dict(zip(columns, row, strict=True)) for row in rows)


def forecasts(records: Runs) -> list[str]:
    """How forecast and measured rises of the source loss, in nats, go together."""
    rises: dict[str, list[tuple[float, float]]] = {"at the end": [], "on the way": []}
    for r in records:
        start, *between, end = r["history"]
        for where, rows in (("at the end", [end]), ("on the way", between)):
            rises[where] += [
                (row["forecast"], row["source_loss"] - start["source_loss"])
                for row in rows
                if row["source_loss"] is not None and row["forecast"] is not None
            ]
    lines = []
    for where, pairs in rises.items():
        if len(pairs) > 2:
            sides = list(zip(*pairs, strict=True))
            logs = [[math.log(max(x, 1e-6)) for x in side] for side in sides]
            lines += [
                "",
                f"Forecast against measured rise of the source loss {where}, {len(pairs)} pairs: "
                f"correlation {correlation(*sides):.2f}, "
                f"of their logarithms {correlation(*logs):.2f}.",
            ]
    return lines


def report(records: Runs) -> list[str]:
    by_pair: dict[str, Methods] = {}
    for pair in dict.fromkeys(r["pair"] for r in records):
        names = dict.fromkeys(r["method"] for r in records if r["pair"] == pair)
        by_pair[pair] = {m: best_rate(records, pair, m, first_seed_only=True) for m in names}
    machines = dict.fromkeys(f"\n{r['pair']}: {r['machine']}" for r in records)
    return [
        *accuracies(by_pair),
        "",
        *against_baselines(by_pair),
        *forecasts(records),
        "",
        f"Means over seeds. Commit {commits(records)}.",
        *machines,
    ]


def main() -> None:
    parser = arguments(__doc__, README_PAIRS)
    parser.add_argument("--methods", default=METHODS, help="e.g. fast:distill=0.1,vanilla")
    parser.add_argument("--seeds", default="0,1,2", help="the first one chooses learning rates")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="retention", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    pairs, methods = args.pairs.split(","), args.methods.split(",")
    first, *others = map(int, args.seeds.split(","))

    def completed(pair: str, seeds: list[int], rates: dict[str, tuple[float | None, ...]]) -> Runs:
        settings = [
            {"pair": pair, "method": method, "lr": lr, "seed": seed}
            for seed in seeds
            for method in methods
            for lr in rates[method]
        ]
        return complete(args.name, run, settings, args.workers, data=args.data.resolve(),
                        evaluations=EVALUATIONS, with_source_inputs=True)  # fmt: skip

    # Pair by pair: what is finished when it is stopped makes whole rows.
    for pair in pairs:
        records = completed(pair, [first], {m: learning_rates(m) for m in methods})
        best = {m: best_rate(records, pair, m, first_seed_only=True)[0]["lr"] for m in methods}
        records = completed(pair, others, {m: (lr,) for m, lr in best.items()})
    save(args.name, report([r for r in records if r["pair"] in pairs]))


if __name__ == "__main__":
    main()
