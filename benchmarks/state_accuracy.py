"""What compact optimizer state costs in accuracy: real fine-tuning runs beside their bytes.

    python benchmarks/state_accuracy.py --data FOLDER

Each storage trains the same network on the same batches: maximum-entropy head, the whole update
(clipping, curvature-weighted pull), cosine schedule. Finished runs are kept in
`benchmarks/results/state_accuracy.jsonl` and not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.data.trees import pick
from fast.heads import forward_logits
from pairs import PAIRS, Folder
from runs import RESULTS, commit, machine

BF16, BYTES = torch.bfloat16, torch.uint8
# Name: dtype of the parameters, options of the optimizer.
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
DEFAULT_PAIRS = "resnet20 -> gtsrb,mobilenet 0.25 -> flowers"
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


def run(pair: str, name: str, seed: int, folder: Folder) -> dict[str, Any]:
    """One fine-tuning run; returns its record."""
    dtype, options = STORAGES[name]
    job, steps = PAIRS[pair].make(folder), PAIRS[pair].steps
    torch.manual_seed(seed)
    model, (x, y) = job.model, job.train
    card = fast.SourceCard.estimate(model, job.source_inputs, num_samples=256, seed=seed)
    fast.replace_head(model, int(y.max()) + 1, sample=pick(x, slice(0, 256)))
    curvature = dict(zip(model.parameters(), card.curvature_for(model.parameters()), strict=True))
    model.to(dtype)
    groups = fast.param_groups(model, lr=LR, head_lr_scale=10.0)
    for group in groups:
        if group["name"].startswith("backbone"):
            found = [curvature[p] for p in group["params"]]
            group |= {"anchor_decay": PULL, "curvature": found, "stall": 5, "ramp": 30}
    optimizer = fast.AdamW(groups, max_grad_norm=1.0, seed=seed, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = batches(len(y), seed)
    for _ in range(steps):
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
    target = accuracy(model, job.val, dtype)
    with fast.source_task(model):
        source = accuracy(model, job.source, dtype)
    return {
        "pair": pair,
        "storage": name,
        "seed": seed,
        "bytes": round(bytes_per_parameter(model, optimizer), 2),
        "target": target,
        "source": source,
        "commit": commit(),
    }


def batches(count: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)[:-1]


def table(records: list[dict[str, Any]]) -> str:
    """Means over seeds, and their standard deviation."""

    def figure(found: list[float]) -> str:
        spread = f" ± {100 * stdev(found):.1f}" if len(found) > 1 else ""
        return f"{100 * mean(found):.1f}{spread}"

    lines = []
    for pair in dict.fromkeys(r["pair"] for r in records):
        seeds = len({r["seed"] for r in records if r["pair"] == pair})
        lines += [
            f"### {pair}, {seeds} seeds",
            "",
            "| storage | bytes per parameter | target accuracy | source accuracy |",
            "| --- | --- | --- | --- |",
        ]
        for name in STORAGES:
            rows = [r for r in records if (r["pair"], r["storage"]) == (pair, name)]
            if rows:
                target, source = (figure([r[k] for r in rows]) for k in ("target", "source"))
                lines.append(f"| {name} | {rows[0]['bytes']:.1f} | {target} | {source} |")
        lines.append("")
    return "\n".join([*lines, f"Accuracies in percent, ± a standard deviation. {machine()}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=DEFAULT_PAIRS, help="names, separated by commas")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder, store = Folder(args.data.resolve()), RESULTS / "state_accuracy.jsonl"
    RESULTS.mkdir(exist_ok=True)
    lines = store.read_text().splitlines() if store.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(r["pair"], r["storage"], r["seed"]) for r in records}
    for pair in args.pairs.split(","):
        for seed in map(int, args.seeds.split(",")):
            for name in STORAGES:
                if (pair, name, seed) in done:
                    continue
                records.append(run(pair, name, seed, folder))
                with store.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
                print(records[-1], flush=True)
    text = table(records)
    (RESULTS / "state_accuracy.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
