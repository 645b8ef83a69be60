"""Measure the target task of a network that is rewound, and teach it again."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.adapt.network.head_start import start_head
from fast.data.dataset import as_data
from fast.data.labels import check_labels
from fast.data.stream import TrainBatches
from fast.data.trees import concatenate, length, move, pick
from fast.heads import (
    FeatureNorm,
    TaskHead,
    calibrate_from,
    features_of,
    fold_head,
    forward_logits,
    task_head,
)
from fast.heads.find import HeadLayer, layer_like
from fast.heads.forward import evaluating
from fast.train.rewind.statistics import MovingStatistics

# The most samples that are used, and how many of them only measure. They are few, because a rewind
# has a fifth of the time of the run before it.
LIMIT, MOST_HELD_BACK = 1152, 128
BATCH_SIZE = 128
HEAD_STEPS = 200


class Target:
    """Some samples of the target task.

    Args:
        data: samples in any form that `fast.finetune` takes for `train`.
        model: the fine-tuned network.
        device: the device of the network.
        seed: the seed that decides which samples are used.

    Attributes:
        statistics: the statistics of the target's batch norms.

    Raises:
        ValueError, TypeError: the data are no labelled samples, are too few, or have other labels.
    """

    def __init__(self, data: Any, model: nn.Module, device: torch.device, seed: int) -> None:
        head = task_head(model)
        assert head is not None
        inputs, labels, count = [], [], 0
        for x, y, _ in TrainBatches(as_data(data, "data"), BATCH_SIZE, seed).once():
            inputs.append(x)
            labels.append(y)
            count += length(x)
            if count >= LIMIT:
                break
        y = check_labels(torch.cat(labels), head.num_classes, "data")
        num_held_back = min(MOST_HELD_BACK, count // 3)
        if num_held_back < 2:
            raise ValueError(f"data: {count} samples of the target task; give at least 6")
        x = concatenate(inputs)
        self.held_inputs = move(pick(x, slice(num_held_back)), device)
        self.held_labels = y[:num_held_back].to(device)
        self.inputs = move(pick(x, slice(num_held_back, count)), device)
        self.labels = y[num_held_back:count].to(device)
        self._seed = seed
        some = [pick(self.inputs, slice(BATCH_SIZE))]
        self.statistics = MovingStatistics(model, some, source=False)

    def accuracy(self, model: nn.Module) -> float:
        """The accuracy on held-back samples, from which the fine-tuning run may have learned."""
        with evaluating(model):
            answers = forward_logits(model, self.held_inputs).argmax(1)
        return (answers == self.held_labels).double().mean().item()

    def _pieces(self) -> list[Any]:
        """The inputs to learn from, in batches."""
        starts = range(0, len(self.labels), BATCH_SIZE)
        return [pick(self.inputs, slice(i, i + BATCH_SIZE)) for i in starts]

    def fit(self, model: nn.Module, least: float) -> float:
        """Fit what belongs to the target alone to the present weights.

        The statistics of its batch norms follow the weights. Where its accuracy is below `least`,
        the head learns on, and is put back if that made it worse. A head on maps of features stays
        as it is.

        Returns:
            the accuracy afterwards.
        """
        self.statistics.follow()
        head = task_head(model)
        assert head is not None
        with evaluating(model):
            held_features = features_of(model, head, self.held_inputs)
        if held_features.dim() != 2:
            return self.accuracy(model)
        before = self._right(head, held_features)
        if before >= least:
            return before
        with evaluating(model):
            features = torch.cat([features_of(model, head, x) for x in self._pieces()])
        was = copy.deepcopy(head.linear), copy.deepcopy(head.norm)
        normalise(head, features)
        start_head(
            head, features, self.labels, loss=F.cross_entropy, steps=HEAD_STEPS, seed=self._seed
        )
        model.eval()
        after = self._right(head, held_features)
        if after < before:
            head.linear, head.norm = was
        return max(before, after)

    @torch.no_grad()
    def _right(self, head: TaskHead, features: Tensor) -> float:
        """The accuracy of the head on features of the held-back samples."""
        answers = head.linear(features if head.norm is None else head.norm(features)).argmax(1)
        return (answers == self.held_labels).double().mean().item()


@torch.no_grad()
def normalise(head: TaskHead, features: Tensor) -> None:
    """Let the head see these features normalised, and give the same answers."""
    plain, norm = plain_layer(head), FeatureNorm(features.shape[1]).to(features)
    calibrate_from(norm, [features])
    layer = layer_like(plain, len(plain.weight), bias=True)
    bias = torch.zeros_like(plain.weight[:, 0]) if plain.bias is None else plain.bias
    assert layer.bias is not None
    layer.weight.copy_(plain.weight / norm.scale())
    layer.bias.copy_(bias + plain.weight @ norm.mean)
    head.linear, head.norm = layer, norm


def plain_layer(head: TaskHead) -> HeadLayer:
    """A layer that gives the answers of the target head, normalisation included."""
    alone = nn.Sequential(copy.deepcopy(head))
    fold_head(alone)
    return cast(HeadLayer, alone[0])
