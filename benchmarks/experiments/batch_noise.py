"""What batch norms of the target's own are worth, by how noisy the statistics of a batch are.

    python -m benchmarks.experiments.batch_noise --data FOLDER

The norms of a network stay the source's, or the target gets some of its own, whose statistics are
those of each batch in training. `fast` runs without source inputs. Finished runs are kept in
`benchmarks/results/batch_noise.jsonl` and not run again.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch

from benchmarks.common import Record, arguments, cell, complete, machine, save_learned_and_lost
from benchmarks.finetune.regimes.baselines import finetune
from benchmarks.finetune.regimes.samples import Task
from fast.adapt.network.noise import STATISTICS_OF, added_by_batches
from fast.heads import find_head

PAIRS = (
    "efficientnet lite0 -> flowers,efficientnet lite0 -> gtsrb,resnet44 -> flowers,"
    "resnet32 -> fashion_mnist,resnet20 -> gtsrb,resnet20 -> omniglot"
)
SIZES = (64, 16)
NORMS = ("frozen", "per_task")
METHODS = ("adapter", "fast")


def run(*, pair: str, size: int, method: str, batch_norm: str, data: Path) -> Record:
    torch.manual_seed(0)
    task = Task(pair, data, seed=0)
    task.options["batch_size"] = size
    sample = task.train[0][:STATISTICS_OF]
    added = added_by_batches(task.model, find_head(task.model, sample[:2]).module, sample)
    record = finetune(task, steps=task.real.steps, method=method, batch_norm=batch_norm)
    return record | {"added": added, "machine": machine()}


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="samples of a step")
    args = parser.parse_args()
    pairs, methods, sizes = (x.split(",") for x in (args.pairs, args.methods, args.sizes))
    settings = [
        {"pair": pair, "size": int(size), "method": method, "batch_norm": norms}
        for size, method, pair, norms in product(sizes, methods, pairs, NORMS)
    ]
    records = complete("batch_noise", run, settings, data=args.data.resolve())
    have = [method for method in METHODS if any(r["method"] == method for r in records)]
    rows = []
    for size, pair in product(SIZES, PAIRS.split(",")):
        added = [r["added"] for r in records if (r["pair"], r["size"]) == (pair, size)]
        if added:
            row = {
                "pair": pair,
                "samples of a step": size,
                f"variance that {STATISTICS_OF} add / between inputs": f"{added[0]:.3f}",
            }
            for method in have:
                row[f"{method}: norms of the source / of its own"] = " / ".join(
                    cell(records, pair=pair, size=size, method=method, batch_norm=norms)
                    for norms in NORMS
                )
            rows.append(row)
    save_learned_and_lost("batch_noise", __doc__, rows, records)


if __name__ == "__main__":
    main()
