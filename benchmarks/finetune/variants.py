"""Does FAST learn faster and forget less? Every method on real pairs, over seeds, as one table.

    python benchmarks/finetune.py --data FOLDER

Finished runs are kept in `benchmarks/results/finetune.jsonl` and not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import RESULTS, machine
from benchmarks.finetune.finetune_table import table
from benchmarks.finetune.runs import Task, complete, learning_rates

ISSUE_PAIRS = (
    "resnet20 -> sign_digits,resnet20 -> gtsrb,mobilenet 0.25 -> flowers,minilm -> banking77"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=ISSUE_PAIRS, help="names, separated by commas")
    parser.add_argument(
        "--methods", default="fast,vanilla", help="e.g. fast,fast:distill=0:ramp=0,vanilla"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="finetune", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    pairs = args.pairs.split(",")
    tasks = [
        Task(pair, spec, lr, int(seed), args.data.resolve())
        for seed in args.seeds.split(",")
        for pair in pairs
        for spec in args.methods.split(",")
        for lr in learning_rates(spec)
    ]
    records = complete(tasks, RESULTS / f"{args.name}.jsonl", args.workers)
    text = table([r for r in records if r["pair"] in pairs], machine())
    (RESULTS / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
