"""The effect in a minute, offline: teach a network of digits 0-4 the digits 5-9; see what it loses.

Pretrains a small convolutional network on scikit-learn's digits 0-4, adapts it to 5-9 by `vanilla`
fine-tuning and by `fast`, over three seeds, and prints what each learned and what each kept.
Vanilla gets the better of two learning rates; fast its defaults.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

from fast.cli.options import folder_name
from fast.cli.report.html import save_curves
from fast.cli.report.summary import NOTES, Run, summarise
from fast.cli.report.table import text_table
from fast.files import check_writable

SEEDS = (0, 1, 2)
VANILLA_LRS = (3e-4, 1e-3)
FAST_LR = 1e-3
STEPS, EVAL_EVERY, BATCH = 100, 5, 64
PRETRAIN_EPOCHS, PRETRAIN_LR = 30, 3e-3
# 8x8 images leave a second thread nothing but barriers: pretraining took 2.5 s with one thread,
# 6.7 s with two, 36 s with two on a busy machine (2 cores).
THREADS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=folder_name,
        default="fast-demo",
        metavar="FOLDER",
        help="of demo.png (default: fast-demo)",
    )


def run(args: argparse.Namespace) -> int:
    check_writable(Path(args.output), "--output")

    import torch

    start = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        runs = _pretrain_and_adapt(start)
    finally:
        torch.set_num_threads(threads)
    header, rows = summarise(runs)
    # The clock of runs this short says nothing about the methods.
    rows = [row[: header.index("seconds")] for row in rows]
    print("\n" + text_table(header[: header.index("seconds")], rows) + f"\n\n{NOTES}")
    figure = Path(args.output) / "demo.png"
    save_curves(runs, "Digits 0-4, then 5-9", figure)
    print(f"\n{figure} ({time.monotonic() - start:.0f} s in all)")
    return 0


def _pretrain_and_adapt(start: float) -> list[Run]:
    source, target = digits(range(5)), digits(range(5, 10))
    network = pretrain(*source)
    print(f"pretrained on digits 0-4 ({time.monotonic() - start:.0f} s); adapting to 5-9:")
    runs = [_adapt(network, source, target, "fast", seed, FAST_LR) for seed in SEEDS]
    vanilla = {
        lr: [_adapt(network, source, target, "vanilla", seed, lr) for seed in SEEDS]
        for lr in VANILLA_LRS
    }
    runs += max(vanilla.values(), key=lambda rs: sum(r.target_accuracy for r in rs))
    return runs


def digits(which: range) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """`(train, test)` of these digits, labels from 0; 70 % and 30 % of each class.

    Images are `[N, 1, 8, 8]` in -1..1 (scikit-learn's copy of the UCI handwritten digits).
    """
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    from fast.data.sources import Split, stratified_split

    raw = load_digits()
    chosen = np.isin(raw.target, list(which))
    images = (raw.images[chosen, None] / 8 - 1).astype(np.float32)
    labels = raw.target[chosen].astype(np.int64) - which.start
    train, test = stratified_split(Split(inputs=images, labels=labels), 0.3)

    def tensors(split: Split) -> tuple[Any, Any]:
        return torch.from_numpy(split.inputs), torch.from_numpy(split.labels)

    return tensors(train), tensors(test)


def build_network(num_classes: int = 5) -> Any:
    """Three 3x3 convolutions with batch norm, global average, linear head: 24 k parameters."""
    from torch import nn

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 1),
        *block(16, 32, 2),
        *block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


def pretrain(train: tuple[Any, Any], test: tuple[Any, Any]) -> Any:
    """The source network: plain AdamW with a cosine schedule."""
    import torch
    import torch.nn.functional as F

    x, y = train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=PRETRAIN_LR, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAIN_EPOCHS)
        for _ in range(PRETRAIN_EPOCHS):
            for index in torch.randperm(len(y)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(network(x[index]), y[index]).backward()
                optimizer.step()
            schedule.step()
    return network.eval()


def _adapt(network: Any, source: Any, target: Any, method: str, seed: int, lr: float) -> Run:
    import fast

    start = time.monotonic()
    result = fast.finetune(
        copy.deepcopy(network),
        train=target[0],
        val=target[1],
        source=source[1],
        method=method,
        steps=STEPS,
        eval_every=EVAL_EVERY,
        batch_size=BATCH,
        lr=lr,
        seed=seed,
        progress=False,
    )
    done = Run.of(result, time.monotonic() - start)
    print(f"  {done}")
    return done
