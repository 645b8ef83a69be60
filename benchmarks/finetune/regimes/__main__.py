"""Does FAST lead where one function answers both tasks, and where two are switched? One table.

    python -m benchmarks.finetune.regimes --data FOLDER

Every method is run in each regime, with and without source inputs, at three lengths and with few
samples, over three seeds. Finished runs are kept in `benchmarks/results/regimes.jsonl` and not run
again, so that it can be stopped at any time; the first seed of every pair comes first.

    python -m benchmarks.finetune.regimes --data FOLDER --methods lp-ft,vanilla --seeds 0 --steps 150
    python -m benchmarks.finetune.regimes --data FOLDER --report      # what there is so far
"""

from __future__ import annotations

from benchmarks.common import Record, arguments, complete
from benchmarks.finetune.regimes.methods import METHODS
from benchmarks.finetune.regimes.runs import run
from benchmarks.finetune.regimes.work import PAIRS, PARTS, SEEDS, rows, settings

NAME = "regimes"


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--steps", default="150,400,1500", help="lengths")
    parser.add_argument("--samples", default="all,10", help="of each class")
    args = parser.parse_args()

    pairs, methods = args.pairs.split(","), args.methods.split(",")
    methods = [m for m in methods if METHODS[m].available]
    lengths, sizes = args.steps.split(","), args.samples.split(",")
    records: list[Record] = complete(NAME, run, [])
    for seed in map(int, args.seeds.split(",")):
        for steps, samples in PARTS:
            if str(steps) not in lengths or str(samples or "all") not in sizes:
                continue
            part = rows(pairs, methods, steps, samples)
            todo = [s for row in part for s in settings(records, row, seed)]
            records = complete(NAME, run, todo, data=args.data.resolve())


if __name__ == "__main__":
    main()
