"""Replay, the plain baseline: train on old data beside the new.

Experience replay (Chaudhry et al. 2019, arXiv 1902.10486; Rolnick et al. 2019, arXiv 1811.11682):
each step also takes a batch of source inputs through the network and adds their loss. It keeps the
source well, and costs twice the work per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.curvature.card.answers import SourceInputs, source_answers
from fast.data.dataset import Data, TrainBatches
from fast.data.labels import check_labels
from fast.data.source_inputs import LIMIT, classes_of_source
from fast.heads import forward_logits, source_task
from fast.heads.class_axis import classes_second


class Replay:
    """The source loss on a batch of source inputs per step.

    Inputs without labels are learned as the pretrained network answers them, with all its doubts
    (cross-entropy with its probabilities).

    Args:
        model: at the pretrained weights.
        data: source inputs, `(inputs, labels)`, a Dataset or a DataLoader; the first `LIMIT`.
        batch_size: source samples per step; all of them where there are fewer.
        seed: of their order.
        device: of the model.

    Raises:
        ValueError: labels that the source head cannot give.
    """

    def __init__(
        self, model: nn.Module, data: Any, batch_size: int, seed: int, device: torch.device
    ) -> None:
        samples = SourceInputs(data, LIMIT).to(device)
        labels = samples.labels
        if labels is not None:
            check_labels(labels, classes_of_source(model, samples), "source_inputs")
        self.answers = source_answers(model, samples).softmax(1) if labels is None else labels
        rows = torch.arange(samples.size)
        self.batches = TrainBatches(
            Data("source_inputs", inputs=samples.inputs, labels=rows), batch_size, seed
        )

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and what to answer, from `step` on: the batches depend on seed and step alone."""
        for inputs, rows, _ in self.batches.from_step(step):
            yield inputs, self.answers[rows.to(self.answers.device)]


def replay_loss(model: nn.Module, inputs: Any, answers: Tensor) -> Tensor:
    """Sum over samples of the source cross-entropy, in nats.

    Args:
        answers: classes `[B]`, or probabilities in the shape of the source logits.
    """
    with source_task(model):
        logits = classes_second(model, forward_logits(model, inputs).float(), inputs)
    per_sample = F.cross_entropy(logits, answers, reduction="none")
    return per_sample.flatten(1).mean(1).sum() if per_sample.dim() > 1 else per_sample.sum()
