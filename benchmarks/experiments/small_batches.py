"""What steps of few samples do to adapters, at their full learning rate and at the one of a run.

    python -m benchmarks.experiments.small_batches --data FOLDER

Twenty samples of each class. Adam's step is as long for a gradient that is noise as for one that is
not, so a run lowers the rate where a step has few samples. Finished runs are kept in
`benchmarks/results/small_batches.jsonl` and not run again.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch

from benchmarks.common import Record, arguments, cell, complete, machine, save_learned_and_lost
from benchmarks.finetune.regimes.baselines import finetune
from benchmarks.finetune.regimes.samples import Task
from fast.adapt.defaults import ADAPTER_LR

PAIRS = (
    "resnet20 -> gtsrb,resnet20 -> sign_digits,resnet44 -> flowers,"
    "mobilenet 0.25 -> flowers,mobilenet 0.25 -> trashnet,minilm -> trec6"
)
SAMPLES = 20
SIZES = (8, 16)
METHODS = {
    "adapter, full rate": {"method": "adapter", "lr": ADAPTER_LR},
    "adapter": {"method": "adapter"},
    "fast": {"method": "fast", "tasks": "together"},
    "lp-ft": {"method": "lp-ft"},
}


def run(*, pair: str, size: int, method: str, data: Path) -> Record:
    torch.manual_seed(0)
    task = Task(pair, data, samples=SAMPLES, seed=0)
    task.options["batch_size"] = size
    record = finetune(task, steps=task.real.steps, **METHODS[method])
    return record | {"machine": machine()}


def main() -> None:
    args = arguments(__doc__, PAIRS).parse_args()
    pairs = args.pairs.split(",")
    settings = [
        {"pair": pair, "size": size, "method": method}
        for size, method, pair in product(SIZES, METHODS, pairs)
    ]
    records = complete("small_batches", run, settings, data=args.data.resolve())
    rows = [
        {"pair": pair, "samples of a step": size}
        | {method: cell(records, pair=pair, size=size, method=method) for method in METHODS}
        for pair, size in product(pairs, SIZES)
    ]
    save_learned_and_lost("small_batches", __doc__, rows, records)


if __name__ == "__main__":
    main()
