"""The task of `fast demo` and of `--demo`: a network that knows the digits 0-4 is to learn 5-9."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.cli.task.load import LoadedTask
from fast.data.sources import Split, stratified_split
from fast.models.loaded import LoadedModel

Samples = tuple[Tensor, Tensor]
PRETRAIN_EPOCHS, PRETRAIN_LR, PRETRAIN_BATCH = 30, 3e-3, 64
# A second thread has too little to do on 8x8 images, and waits: pretraining took 2.5 s with one
# thread, 6.7 s with two, and 36 s with two on a busy machine (2 cores).
THREADS = 1


@contextmanager
def few_threads() -> Iterator[None]:
    """Run the block with `THREADS` threads of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digits_task() -> LoadedTask:
    """A network of the digits 0-4, to be adapted to 5-9."""
    source, (train, val) = digits(range(5)), digits(range(5, 10))
    return LoadedTask(
        name="digits",
        loaded=LoadedModel(model=pretrain(source[0])),
        classes=("5", "6", "7", "8", "9"),
        train=train,
        val=val,
        source=source[1],
        sizes={"train": len(train[1]), "val": len(val[1]), "source": len(source[1][1])},
    )


def digits(which: range) -> tuple[Samples, Samples]:
    """`(train, test)`: 70 % and 30 % of the samples of each of these digits, with labels from 0.

    Images are `[N, 1, 8, 8]` in -1..1 (scikit-learn's copy of the UCI handwritten digits).
    """
    from sklearn.datasets import load_digits  # scikit-learn is optional

    raw = load_digits()
    wanted = np.isin(raw.target, list(which))
    images = (raw.images[wanted, None] / 8 - 1).astype(np.float32)
    labels = raw.target[wanted].astype(np.int64) - which.start
    train, test = stratified_split(Split(inputs=images, labels=labels), 0.3)

    def tensors(split: Split) -> Samples:
        return torch.from_numpy(split.inputs), torch.from_numpy(split.labels)

    return tensors(train), tensors(test)


def build_network(num_classes: int = 5) -> nn.Module:
    """Three 3x3 convolutions with batch norm, global average, linear head: 24 k parameters."""

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


def pretrain(train: Samples) -> nn.Module:
    """The source network: plain AdamW with a cosine schedule."""
    x, y = train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=PRETRAIN_LR, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAIN_EPOCHS)
        for _ in range(PRETRAIN_EPOCHS):
            for index in torch.randperm(len(y)).split(PRETRAIN_BATCH):
                optimizer.zero_grad()
                F.cross_entropy(network(x[index]), y[index]).backward()
                optimizer.step()
            schedule.step()
    return network.eval()
