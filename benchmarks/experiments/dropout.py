"""What dropout before the head does to the target, by how much it changes what the head sees.

    python -m benchmarks.experiments.dropout --data FOLDER

Each network gets the dropout that VGGs, MobileNets and EfficientNets have before their head. A row
is run with it, and the run without is the same for every share. Finished runs are kept in
`benchmarks/results/dropout.jsonl` and not run again.
"""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import Record, arguments, cell, complete, machine, save_learned_and_lost
from benchmarks.finetune.regimes.baselines import finetune
from benchmarks.finetune.regimes.samples import Task
from fast.adapt.network.noise import added_by_dropout
from fast.heads import find_head
from fast.heads.batch_norm import set_batch_norm

PAIRS = "resnet20 -> sign_digits,resnet20 -> gtsrb,mobilenet 0.25 -> flowers"
SHARES = (0.0, 0.2, 0.5, 0.8)
WAYS = {
    "one function": {"tasks": "together"},
    "two functions": {"tasks": "switched", "method": "fast"},
    "adapter": {"method": "adapter"},
}


def run(*, pair: str, share: float, way: str, data: Path) -> Record:
    torch.manual_seed(0)
    task = Task(pair, data, seed=0)
    sample = task.train[0][:64]
    head = find_head(task.model, sample[:2])
    parent, _, name = head.name.rpartition(".")
    setattr(task.model.get_submodule(parent), name, nn.Sequential(nn.Dropout(share), head.module))
    added = _added(task.model, sample)
    record = finetune(task, steps=task.real.steps, dropout=True, **WAYS[way])
    return record | {"added": added, "machine": machine()}


def _added(model: nn.Module, sample: Tensor) -> float:
    """The variance that dropout adds, as a run measures it."""
    model = set_batch_norm(copy.deepcopy(model), "frozen")
    return added_by_dropout(model, find_head(model, sample[:2]).module, sample)


def main() -> None:
    args = arguments(__doc__, PAIRS).parse_args()
    pairs = args.pairs.split(",")
    ways = [
        (pair, way)
        for pair, way in product(pairs, WAYS)
        if way != "two functions" or pair.startswith("resnet")
    ]
    settings = [
        {"pair": pair, "share": share, "way": way} for (pair, way), share in product(ways, SHARES)
    ]
    records = complete("dropout", run, settings, data=args.data.resolve())
    rows = []
    for pair, share in product(pairs, SHARES[1:]):
        added = [r["added"] for r in records if (r["pair"], r["share"]) == (pair, share)]
        row = {
            "pair": pair,
            "dropout": share,
            "variance it adds / between inputs": f"{added[0]:.1f}" if added else "-",
        }
        for way in WAYS:
            row[f"{way}: with / without"] = " / ".join(
                cell(records, pair=pair, share=p, way=way) for p in (share, 0.0)
            )
        rows.append(row)
    save_learned_and_lost("dropout", __doc__, rows, records)


if __name__ == "__main__":
    main()
