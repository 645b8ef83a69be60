"""Does FAST forget almost nothing? Every method on five real pairs, as one table.

    python benchmarks/retention.py --data FOLDER

All methods get the same few hundred source inputs and the same number of steps. FAST runs at its
defaults; every baseline at the better of two learning rates, by final target accuracy on the first
seed. Finished runs are kept in `benchmarks/results/retention.jsonl` and not run again.

Variants of a method, on one seed, into files of their own:

    python benchmarks/retention.py --data FOLDER --name tried --seeds 0 \\
        --pairs "resnet20 -> gtsrb" --methods fast,fast:distill=0.1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.finetune.retention_table import chosen_runs, report
from benchmarks.finetune.runs import Task, complete, learning_rates, parse

ISSUE_PAIRS = (
    "resnet20 -> gtsrb,resnet20 -> sign_digits,resnet32 -> fashion_mnist,"
    "mobilenet 0.25 -> flowers,minilm -> sst2"
)
METHODS = "fast,vanilla,lp-ft,l2-sp,ewc,replay"
# Of a baseline only the end is used, and two forecasts on the way: evaluating it as often as FAST
# would take as long as its run.
BASELINE_EVALUATIONS = 3


def task(pair: str, spec: str, lr: float, seed: int, data: Path) -> Task:
    evaluations = None if parse(spec)[0] == "fast" else BASELINE_EVALUATIONS
    return Task(pair, spec, lr, seed, data, True, evaluations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=ISSUE_PAIRS, help="names, separated by commas")
    parser.add_argument("--methods", default=METHODS, help="e.g. fast:distill=0.1,vanilla")
    parser.add_argument("--seeds", default="0,1,2", help="the first one chooses learning rates")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="retention", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    pairs, specs = args.pairs.split(","), args.methods.split(",")
    first, *others = map(int, args.seeds.split(","))
    data, store = args.data.resolve(), RESULTS / f"{args.name}.jsonl"
    # Pair by pair: what is finished when it is stopped makes whole rows.
    for pair in pairs:
        tasks = [
            task(pair, spec, lr, first, data) for spec in specs for lr in learning_rates(spec, True)
        ]
        records = complete(tasks, store, args.workers)
        chosen = {spec: chosen_runs(records, pair, spec)[0]["lr"] for spec in specs}
        tasks = [task(pair, spec, chosen[spec], seed, data) for seed in others for spec in specs]
        records = complete(tasks, store, args.workers)
    text = report([r for r in records if r["pair"] in pairs])
    (RESULTS / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
