"""Accuracy and loss of a classifier on one data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fast.data.dataset import Data
from fast.data.finite import broken_rows
from fast.data.labels import check_labels
from fast.data.trees import kind, move
from fast.heads import evaluating, forward_logits
from fast.heads.forward import taking
from fast.ranks import ALONE, Ranks


class Score(NamedTuple):
    """Accuracy in 0..1 and mean cross-entropy in nats (None where only an accuracy is known)."""

    accuracy: float
    loss: float | None


Evaluator = Callable[[nn.Module], float]


def evaluate(
    model: nn.Module,
    data: Data | Evaluator,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Score:
    """Accuracy and mean cross-entropy, in evaluation mode; every module keeps its mode.

    Args:
        data: a data set, or a function of the model that returns an accuracy in 0..1.
        ranks: that share the batches; of a function, all of them take what the first one's gives.

    Raises:
        TypeError: a function that returns no number.
        ValueError: no accuracy from a function; no samples, labels out of range, or inputs that the
            network does not take. The message names the data.
        FloatingPointError: answers that are not finite (ValueError where inputs are not); the
            message says how many.
    """
    if not isinstance(data, Data):
        with ranks.together(), evaluating(model):
            accuracy = _accuracy(data(model))
        return Score(ranks.from_first(accuracy), None)
    right = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    with ranks.together(), evaluating(model):
        for inputs, labels in data.eval_batches(batch_size, ranks.share):
            with taking(data.name, inputs, model):
                logits = forward_logits(model, move(inputs, device)).float()
            labels = check_labels(labels, logits.shape[1], data.name).to(device)
            right += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            # argmax takes NaN for the class it stands at. Classes ruled out with -inf are answers
            # like others.
            wrong += (~logits.logsumexp(1).isfinite()).sum()
            count += len(labels)
    count = ranks.total(count)
    for figure in (right, loss, wrong):
        ranks.sum_(figure)
    if not count:
        raise ValueError(f"{data.name}: no samples to evaluate on")
    if wrong.item():
        _refuse(data, int(wrong), count, batch_size)
    return Score(right.item() / count, loss.item() / count)


def _refuse(data: Data, wrong: int, count: int, batch_size: int) -> None:
    told = f"{data.name}: the network's answers to {wrong} of {count} samples are NaN or infinite"
    rows = [broken_rows(inputs) for inputs, _ in data.eval_batches(batch_size)]
    broken = sum(int(r.sum()) for r in rows if r is not None)
    if broken:
        raise ValueError(f"{told}: {broken} samples hold NaN or infinite inputs; drop or mend them")
    raise FloatingPointError(
        f"{told}, the inputs are finite: of trained weights, lower lr or set max_grad_norm; of "
        "pretrained ones, look at the weights and at the scale of the inputs"
    )


def _accuracy(found: Any) -> float:
    try:
        accuracy = float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "source: the function must return the accuracy, a number in 0..1; it returned "
            f"{kind(found)}"
        ) from error
    if not 0 <= accuracy <= 1:
        raise ValueError(f"source: the function must return an accuracy in 0..1; got {accuracy:g}")
    return accuracy
