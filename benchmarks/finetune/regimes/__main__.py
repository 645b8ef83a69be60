"""Does FAST lead where one function answers both tasks, and where two are switched? One table.

    python -m benchmarks.finetune.regimes --data FOLDER

Every method is run in each regime, with and without source inputs, at three lengths and with few
samples, over three seeds. Finished runs are kept in `benchmarks/results/regimes.jsonl` and not run
again, and what is missing is shown as missing, so that it can be stopped at any time; the shortest
runs come first, and among them the first seed of every pair.

    python -m benchmarks.finetune.regimes --data FOLDER --methods lp-ft --seeds 0 --steps 150
    python -m benchmarks.finetune.regimes --data FOLDER --report     # what there is so far
    python -m benchmarks.finetune.regimes --data FOLDER --time       # whole calls against LP-FT's
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from benchmarks.common import arguments, complete, save
from benchmarks.finetune.regimes import timing
from benchmarks.finetune.regimes.methods import METHODS
from benchmarks.finetune.regimes.report import report
from benchmarks.finetune.regimes.runs import run
from benchmarks.finetune.regimes.work import LENGTHS, PAIRS, PARTS, SEEDS, rows, settings

NAME, TIMES = "regimes", "regimes_time"


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--networks", type=Path, help="unpacked packages: benchmarks/README.md")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--steps", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--samples", default="all,10", help="of each class")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--time", action="store_true", help="measure the time, and nothing else")
    args = parser.parse_args()

    pairs = args.pairs.split(",")
    folders = {"data": args.data.resolve(), "networks": args.networks and args.networks.resolve()}
    methods = [m for m in args.methods.split(",") if METHODS[m].available]
    seeds, sizes = map(int, args.seeds.split(",")), args.samples.split(",")
    lengths = [] if args.report or args.time else map(int, args.steps.split(","))
    records = complete(NAME, run, [])
    for length, seed, (steps, samples) in product(lengths, seeds, PARTS):
        if steps != length or str(samples or "all") not in sizes:
            continue
        part = rows(pairs, methods, steps, samples)
        todo = [s for row in part for s in settings(records, row, seed)]
        records = complete(NAME, run, todo, **folders)
    todo = timing.settings(timing.PAIRS.split(",")) if args.time else []
    times = complete(TIMES, timing.run, todo, data=folders["data"])
    save(NAME, report(records, times, PAIRS.split(",")))


if __name__ == "__main__":
    main()
