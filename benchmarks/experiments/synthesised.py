"""Can inputs that are made from a network's batch norm statistics stand in for source inputs?

    python -m benchmarks.experiments.synthesised --data FOLDER

Pictures are optimised until every batch norm sees in them the means and variances that it saw in
training, and until the source head is sure of them (DeepInversion, Yin et al. 2020,
arXiv 1912.08795, without its prior on smoothness). They are made once for a network. FAST then
runs three times, as one function for both tasks: it keeps the features of the target's own inputs
(the default), of the synthesised ones, and of real source inputs.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

from torch import Tensor

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.regimes.baselines import finetune
from benchmarks.finetune.regimes.samples import Task

PAIRS = "resnet20 -> omniglot,resnet20 -> sign_digits"
KEPT = ("own inputs", "synthesised", "source inputs")
SAMPLES = (None, 10)


def run(*, pair: str, samples: int | None, kept: str, data: Path) -> Record:
    task = Task(pair, data, samples=samples, seed=0)
    steps = task.real.steps
    start = time.process_time()
    options: dict[str, Tensor] = {}
    if kept == "synthesised":
        options["source_inputs"] = fast.synthetic_inputs(task.model, task.train[0])
    making = time.process_time() - start
    if kept == "source inputs":
        options["source_inputs"] = task.real.source_inputs
    record = finetune(task, steps=steps, tasks="together", **options)
    seconds = time.process_time() - start - making
    return record | {"making": round(making, 1), "seconds": round(seconds, 1)}


def report(records: list[Record]) -> list[str]:
    rows = [
        {
            "pair": r["pair"],
            "samples of each class": r["samples"] or "all",
            "features kept of": r["kept"],
            "target": f"{100 * r['target']:.1f}",
            "source lost": f"{100 * (r['source_before'] - r['source']):.1f}",
            "making them / the run, CPU seconds": f"{r['making']:.0f} / {r['seconds']:.0f}",
        }
        for r in records
    ]
    return [__doc__ or "", *table(rows), "", f"One seed. {machine()}. {commits(records)}."]


def main() -> None:
    args = arguments(__doc__, PAIRS).parse_args()
    settings = [
        {"pair": pair, "samples": samples, "kept": kept}
        for pair, samples, kept in product(args.pairs.split(","), SAMPLES, KEPT)
    ]
    save("synthesised", report(complete("synthesised", run, settings, data=args.data.resolve())))


if __name__ == "__main__":
    main()
