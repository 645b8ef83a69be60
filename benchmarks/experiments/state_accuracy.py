"""What compact optimizer state costs in accuracy: real fine-tuning runs beside their bytes.

    python -m benchmarks.experiments.state_accuracy --data FOLDER

Each storage trains the same network on the same batches: maximum-entropy head, the whole update
(clipping, curvature-weighted pull), cosine schedule. Finished runs are kept in
`benchmarks/results/state_accuracy.jsonl` and not run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fast
from benchmarks.common import Record, arguments, complete, machine, save, table
from benchmarks.real_pairs import real_pair
from fast.data.trees import pick
from fast.heads import forward_logits

BF16, BYTES = torch.bfloat16, torch.uint8
# The dtype of the parameters and the options of the optimizer, by name.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16 moments": (torch.float32, {"state_dtype": BF16}),
    "bf16 moments, anchor, curvature": (
        torch.float32, {"state_dtype": BF16, "anchor_dtype": BF16, "curvature_dtype": BF16},
    ),
    "8-bit moments": (torch.float32, {"state_dtype": BYTES}),
    "8-bit moments, curvature; bf16 anchor": (
        torch.float32, {"state_dtype": BYTES, "anchor_dtype": BF16, "curvature_dtype": BYTES},
    ),
    "bf16 parameters, exact": (BF16, {"exact_bf16": True}),
    "bf16 parameters, exact; all compact": (
        BF16, {"exact_bf16": True, "state_dtype": BYTES, "curvature_dtype": BYTES},
    ),
    "bf16 parameters, rounded": (BF16, {}),
}  # fmt: skip
PAIRS = "resnet20 -> gtsrb,mobilenet 0.25 -> flowers"
BATCH, LR, PULL = 64, 1e-3, 100.0


def bytes_per_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Bytes of parameters and state over the number of parameters."""
    params = [p for p in model.parameters() if optimizer.state.get(p)]
    tensors = [t for p in params for t in (p, *optimizer.state[p].values())]
    held = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    return held / sum(p.numel() for p in params)


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Any, torch.Tensor], dtype: torch.dtype) -> float:
    x, y = data
    model.eval()
    parts = torch.arange(len(y)).split(200)
    right = sum(
        (forward_logits(model, pick(x, i).to(dtype)).argmax(1) == y[i]).sum() for i in parts
    )
    return float(right) / len(y)


def run(*, pair: str, storage: str, seed: int, data: Path) -> Record:
    """One fine-tuning run."""
    dtype, options = STORAGES[storage]
    real = real_pair(pair, data)
    torch.manual_seed(seed)
    model, (x, y) = real.model, real.train
    card = fast.SourceCard.estimate(model, real.source_inputs, num_samples=256, seed=seed)
    fast.replace_head(model, real.num_classes, sample=pick(x, slice(0, 256)))
    curvature = dict(zip(model.parameters(), card.curvature_for(model.parameters()), strict=True))
    model.to(dtype)
    groups = fast.param_groups(model, lr=LR, head_lr_scale=10.0)
    for group in groups:
        if group["name"].startswith("backbone"):
            group |= {"anchor_decay": PULL, "stall": 5, "ramp": 30}
            group["curvature"] = [curvature[p] for p in group["params"]]
    optimizer = fast.AdamW(groups, max_grad_norm=1.0, seed=seed, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, real.steps)
    rows = batches(len(y), seed)
    for _ in range(real.steps):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        index = next(rows)
        optimizer.zero_grad()
        logits = forward_logits(model, pick(x, index).to(dtype))
        F.cross_entropy(logits.float(), y[index]).backward()
        optimizer.step()
        schedule.step()
    target = accuracy(model, real.val, dtype)
    with fast.source_task(model):
        source = accuracy(model, real.source, dtype)
    size = round(bytes_per_parameter(model, optimizer), 2)
    return {"bytes": size, "target": target, "source": source}


def batches(count: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)[:-1]


def report(records: list[Record]) -> list[str]:
    """A table per pair: means over seeds, and their standard deviation."""

    def figure(values: list[float]) -> str:
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * mean(values):.1f}{spread}"

    lines = []
    for pair in dict.fromkeys(r["pair"] for r in records):
        seeds = len({r["seed"] for r in records if r["pair"] == pair})
        rows = []
        for name in STORAGES:
            runs = [r for r in records if (r["pair"], r["storage"]) == (pair, name)]
            if runs:
                target, source = (figure([r[k] for r in runs]) for k in ("target", "source"))
                rows.append(
                    {
                        "storage": name,
                        "bytes per parameter": f"{runs[0]['bytes']:.1f}",
                        "target accuracy": target,
                        "source accuracy": source,
                    }
                )
        lines += [f"### {pair}, {seeds} seeds", "", *table(rows), ""]
    return [*lines, f"Accuracies in percent, ± a standard deviation. {machine()}."]


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    settings = [
        {"pair": pair, "storage": storage, "seed": int(seed)}
        for pair, seed, storage in product(args.pairs.split(","), args.seeds.split(","), STORAGES)
    ]
    name = "state_accuracy"
    save(name, report(complete(name, run, settings, data=args.data.resolve())))


if __name__ == "__main__":
    main()
