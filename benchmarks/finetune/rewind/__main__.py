"""Is forgetting undone? `fast.rewind` on checkpoints that have forgotten, as one table.

    python -m benchmarks.finetune.rewind --data FOLDER --checkpoints FOLDER

Against the plain line (WiSE-FT: all weights and statistics interpolated, to the same budget on the
same held-back source inputs), and against runs of FAST with that budget, which are those of
`benchmarks/results/budget.jsonl`; for 2 points those without a budget, which lose less than that.
The source is measured on labelled test data that no method sees. Finished runs are kept in
`benchmarks/results/rewind.jsonl` and not run again.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import RESULTS, Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.rewind.measure import run
from benchmarks.finetune.rewind.tuned import PLAIN
from benchmarks.real_pairs import README_PAIRS
from fast.adapt.config import Budget

POINTS = ("minilm -> sst2",)
INSIDE = (0.5, 1.5)
WANTED_SHARE, WANTED_GAP = 0.2, 0.5


def lost(record: Record, which: str) -> float:
    """What is lost on test data, in the unit of the budget."""
    before, after = record["before"], record[which]
    if Budget.parse(record["budget"]).points:
        return before["source"] - after["source"]
    return after["source_loss"] - before["source_loss"]


def of_fast(pair: str, budget: str) -> float | None:
    """Target accuracy of FAST's runs, mean over seeds."""
    method = "fast" if budget == "2%" else f"fast:forget_budget={budget}"
    names = {method, method.replace(budget, repr(budget))}
    runs = [json.loads(line) for line in (RESULTS / "budget.jsonl").read_text().splitlines()]
    ends = [
        r["history"][-1]["target_accuracy"]
        for r in runs
        if r["pair"] == pair and r["method"] in names
    ]
    return sum(ends) / len(ends) if ends else None


def report(records: list[Record]) -> list[str]:
    rows = []
    for r in records:
        ratio = lost(r, "rewound") / Budget.parse(r["budget"]).amount
        theirs = of_fast(r["pair"], r["budget"])
        line, ours = r["line"]["target"], r["rewound"]["target"]
        closed = (ours - line) / (theirs - line) if theirs and theirs - line > 0.01 else None
        share = r["seconds"] / r["seconds_of_run"]
        misses = [
            name
            for name, missed in (
                ("budget", not INSIDE[0] <= ratio <= INSIDE[1]),
                ("gap", closed is not None and closed < WANTED_GAP),
                ("time", share > WANTED_SHARE),
            )
            if missed
        ]
        rows.append(
            {
                "missed": ", ".join(misses) or "-",
                "pair": r["pair"],
                "run": f"{r['method']}, seed {r['seed']}",
                "budget": r["budget"],
                "source before -> tuned -> rewound": " -> ".join(
                    f"{100 * r[k]['source']:.1f}" for k in ("before", "tuned", "rewound")
                ) + " %",
                "lost on test data / budget": f"{ratio:.2f}",
                "target: tuned": f"{100 * r['tuned']['target']:.1f}",
                "plain line": f"{100 * line:.1f}",
                "rewound": f"**{100 * ours:.1f}** ({r['rewound']['stage']})",
                "FAST": "-" if theirs is None else f"{100 * theirs:.1f}",
                "gap closed": "-" if closed is None else f"{closed:.2f}",
                "time / run": f"{share:.2f}",
            }
        )  # fmt: skip
    rows.sort(key=lambda row: -len(row["missed"].strip("-")))
    return [
        *table(rows),
        "",
        "Budgets are nats of source loss or points of source accuracy. Wanted: what is lost over "
        f"the budget between {INSIDE[0]} and {INSIDE[1]}, at least {WANTED_GAP} of the gap between "
        f"the plain line and FAST closed, at most {WANTED_SHARE} of the time of the run (processor "
        "time). Where the stage is tuned, the tuned network keeps the budget already, and loses "
        f"what it loses. {machine()}. Commit {commits(records)}.",
    ]


def main() -> None:
    parser = arguments(__doc__, README_PAIRS)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder; made as needed")
    parser.add_argument("--methods", default=f"vanilla,lp-ft,{PLAIN}")
    parser.add_argument("--nats", default="0.1,0.3", help="budgets of pairs with a source head")
    parser.add_argument("--points", default="2%")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="rewind", help="of the files in benchmarks/results/")
    args = parser.parse_args()
    pairs = args.pairs.split(",")
    settings = [
        {"pair": pair, "method": method, "budget": budget, "seed": int(seed)}
        for seed in args.seeds.split(",")
        for method in args.methods.split(",")
        for pair in (pairs if method != PLAIN else pairs[:1])
        for budget in (
            *(() if pair in POINTS else args.nats.split(",")),
            *filter(None, args.points.split(",")),
        )
    ]
    records = complete(
        args.name, run, settings, args.workers, data=args.data.resolve(),
        checkpoints=args.checkpoints.resolve(),
    )  # fmt: skip
    save(args.name, report([r for r in records if r["pair"] in pairs]))


if __name__ == "__main__":
    main()
