"""Which samples a run learns from and is measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fast
from benchmarks.real_pairs import NearestClassMean, RealPair, Split, real_pair
from fast.data.trees import pick
from fast.heads import evaluating, forward_logits

# Test samples of either task. They are the same in every run, so that differences between methods
# are known better than the accuracies themselves.
MEASURED = 500
EVAL_BATCH = 125


def few(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Rows `[R]` of up to `per_class` samples of each class, drawn by the seed."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([shuffled[labels[shuffled] == c][:per_class] for c in labels.unique()])


def some(split: Split, count: int = MEASURED) -> Split:
    """At most `count` samples, always the same; data sets may be sorted by class."""
    inputs, labels = split
    if len(labels) <= count:
        return split
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return pick(inputs, rows), labels[rows]


class Task:
    """A pair with the samples of one run.

    Args:
        data, networks: see `real_pair`.
        samples: of each class, or None for all.

    Attributes:
        train, val, source: what is learned from, and what target and source are measured on.
        options: of `fast.finetune`, as the pair and the number of samples want them.
    """

    def __init__(
        self,
        pair: str,
        data: Path,
        networks: Path | None = None,
        *,
        samples: int | None = None,
        seed: int,
    ) -> None:
        self.real: RealPair = real_pair(pair, data, networks)
        self.model = self.real.model
        if any(isinstance(m, nn.Conv2d) for m in self.model.modules()):
            # A step then takes two thirds of the time, of every method.
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs, labels = self.real.train
        if samples is not None:
            rows = few(labels, samples, seed)
            inputs, labels = pick(inputs, rows), labels[rows]
        self.train: Split = inputs, labels
        self.val = some(self.real.val)
        source = self.real.source
        self.source: Split | Callable[[nn.Module], float]
        if isinstance(source, NearestClassMean):
            self.source = NearestClassMean(source.reference, some(source.test))
        else:
            self.source = source if callable(source) else some(source)
        batch_size = min(self.real.batch_size, len(labels))
        self.options: dict[str, Any] = {
            "num_classes": self.real.num_classes,
            "batch_size": batch_size,
            "seed": seed,
        }

    def target_accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.val)

    def source_accuracy(self, model: nn.Module) -> float:
        with fast.source_task(model), evaluating(model):
            return self.source(model) if callable(self.source) else accuracy(model, self.source)


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of right answers, in evaluation mode."""
    inputs, labels = split
    right = 0
    with evaluating(model):
        for start in range(0, len(labels), EVAL_BATCH):
            rows = slice(start, start + EVAL_BATCH)
            answers = forward_logits(model, pick(inputs, rows)).argmax(1)
            right += int((answers == labels[rows]).sum())
    return right / len(labels)
