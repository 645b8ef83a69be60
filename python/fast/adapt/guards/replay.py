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

from fast.data.labels import check_labels
from fast.data.source_inputs import LIMIT, SourceInputs
from fast.data.stream import row_batches
from fast.data.trees import pick
from fast.heads import forward_logits, source_task
from fast.heads.class_axis import classes_second
from fast.heads.outputs import source_logits


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
        samples = SourceInputs.parse(data, LIMIT, "source_inputs").to(device)
        labels = samples.labels
        if labels is not None:
            num_classes = source_logits(model, samples.part(0, 2)).shape[1]
            check_labels(labels, num_classes, "source_inputs")
        self.answers = source_logits(model, samples).softmax(1) if labels is None else labels
        self.inputs = samples.inputs
        self.batch_size, self.seed = batch_size, seed

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and what to answer, from `step` on: the batches depend on seed and step alone."""
        for rows in row_batches(len(self.answers), self.batch_size, self.seed, step):
            yield pick(self.inputs, rows), self.answers[rows.to(self.answers.device)]


def replay_loss(model: nn.Module, inputs: Any, answers: Tensor) -> Tensor:
    """Sum over samples of the source cross-entropy, in nats.

    Args:
        answers: classes `[B]`, or probabilities in the shape of the source logits.
    """
    with source_task(model):
        logits = classes_second(model, forward_logits(model, inputs).float(), inputs)
    per_sample = F.cross_entropy(logits, answers, reduction="none")
    return per_sample.flatten(1).mean(1).sum() if per_sample.dim() > 1 else per_sample.sum()
