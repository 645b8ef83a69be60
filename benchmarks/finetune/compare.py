"""Does FAST learn faster and forget less? Every method on real pairs, over seeds, as one table.

    python -m benchmarks.finetune.compare --data FOLDER

Finished runs are kept in `benchmarks/results/finetune.jsonl` and not run again.
"""

from __future__ import annotations

from itertools import product

from benchmarks.common import arguments, commits, complete, machine, save, table
from benchmarks.finetune.figures import Runs, best_rate, final, lost, source_change, steps_to
from benchmarks.finetune.runs import learning_rates, rate, run

PAIRS = "resnet20 -> sign_digits,resnet20 -> gtsrb,mobilenet 0.25 -> flowers,minilm -> banking77"


def report(records: Runs) -> list[str]:
    """One row per pair and method, with what the method is judged by against vanilla."""
    rows = []
    for pair in dict.fromkeys(r["pair"] for r in records):
        vanilla = best_rate(records, pair, "vanilla")
        goal, all_lost = final(vanilla, "target_accuracy"), lost(vanilla)
        methods = dict.fromkeys(r["method"] for r in records if r["pair"] == pair)
        for method in sorted(methods, key=lambda m: m != "fast"):
            runs = best_rate(records, pair, method)
            steps = steps_to(runs, goal)
            share = lost(runs) / all_lost if all_lost else float("nan")
            reached = steps and f"{steps / runs[0]['history'][-1]['step']:.2f}"
            rows.append(
                {
                    "pair": pair,
                    "method, lr": f"{method}, {rate(runs)}",
                    "seeds": len(runs),
                    "target accuracy": f"{100 * final(runs, 'target_accuracy'):.1f} %",
                    "source accuracy": source_change(runs),
                    "lost, share of vanilla's": f"{share:.2f}",
                    "steps to vanilla's final target, share": reached or "not reached",
                }
            )
    return [
        *table(rows),
        "",
        f"Means over seeds. {machine()}. Commit {commits(records)}.",
    ]


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument(
        "--methods", default="fast,vanilla", help="e.g. fast,fast:distill=0:ramp=0,vanilla"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="finetune", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    pairs = args.pairs.split(",")
    settings = [
        {"pair": pair, "method": method, "lr": lr, "seed": int(seed)}
        for seed, pair, method in product(args.seeds.split(","), pairs, args.methods.split(","))
        for lr in learning_rates(method)
    ]
    data = args.data.resolve()
    records = complete(args.name, run, settings, args.workers, data=data, evaluations={})
    save(args.name, report([r for r in records if r["pair"] in pairs]))


if __name__ == "__main__":
    main()
