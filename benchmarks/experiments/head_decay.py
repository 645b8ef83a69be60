"""What the decay of the head of adapters is worth where samples are few, and what it takes.

    python -m benchmarks.experiments.head_decay --data FOLDER

Ten samples of each class, one seed. A head that does not decay learns them by heart. One that does
makes the features grow, which tracked statistics take back when the rate has fallen already.
Finished runs are kept in `benchmarks/results/head_decay.jsonl` and not run again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import Record, arguments, cell, complete, machine, save_learned_and_lost
from benchmarks.finetune.regimes.baselines import finetune
from benchmarks.finetune.regimes.samples import Task
from fast.heads.feature_norm import FeatureNorm

PAIRS = "resnet20 -> gtsrb,resnet20 -> sign_digits,resnet44 -> flowers,mobilenet 0.5 -> gtsrb"
SAMPLES = 10
TRACKED = "decay 4, tracked statistics"
METHODS: dict[str, dict[str, Any]] = {"no decay": {"head_decay": 0.0}, TRACKED: {}, "decay 4": {}}


def run(*, pair: str, method: str, data: Path) -> Record:
    torch.manual_seed(0)
    task = Task(pair, data, samples=SAMPLES, seed=0)
    tracked: AbstractContextManager[Any] = patch.object(FeatureNorm, "freeze")
    with tracked if method == TRACKED else nullcontext():
        record = finetune(task, method="adapter", steps=task.real.steps, **METHODS[method])
    return record | {"machine": machine()}


def main() -> None:
    args = arguments(__doc__, PAIRS).parse_args()
    pairs = args.pairs.split(",")
    settings = [{"pair": pair, "method": method} for method, pair in product(METHODS, pairs)]
    records = complete("head_decay", run, settings, data=args.data.resolve())
    rows = [
        {"pair": pair} | {method: cell(records, pair=pair, method=method) for method in METHODS}
        for pair in pairs
    ]
    save_learned_and_lost("head_decay", __doc__, rows, records)


if __name__ == "__main__":
    main()
