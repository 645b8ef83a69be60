"""Accuracy and loss of a classifier on one data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fast.heads import evaluating, forward_logits
from fast.train.data import Data, move, taking
from fast.train.labels import check_labels


class Score(NamedTuple):
    """Accuracy in 0..1 and mean cross-entropy in nats (None where only an accuracy is known)."""

    accuracy: float
    loss: float | None


Evaluator = Callable[[nn.Module], float]


def evaluate(
    model: nn.Module, data: Data | Evaluator, batch_size: int, device: torch.device
) -> Score:
    """Accuracy and mean cross-entropy, in evaluation mode; every module keeps its mode.

    Args:
        data: a data set, or a function of the model that returns an accuracy in 0..1.

    Raises:
        ValueError: no samples, labels out of range, or inputs that the network does not take; the
            message names the data.
    """
    if not isinstance(data, Data):
        with evaluating(model):
            return Score(float(data(model)), None)
    right = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    with evaluating(model):
        for inputs, labels in data.eval_batches(batch_size):
            with taking(data.name, inputs):
                logits = forward_logits(model, move(inputs, device)).float()
            labels = check_labels(labels, logits.shape[1], data.name).to(device)
            right += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            count += len(labels)
    if not count:
        raise ValueError(f"{data.name}: no samples to evaluate on")
    return Score(right.item() / count, loss.item() / count)
