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

from fast.adapt.guards.base import Guard, Seen
from fast.curvature.card.answers import source_answers
from fast.data.dataset import Data
from fast.data.labels import check_labels
from fast.data.source_inputs import SourceInputs
from fast.data.stream import TrainBatches
from fast.data.trees import move, pick
from fast.heads import forward_logits, source_task
from fast.heads.class_axis import classes_second


class Replay(Guard):
    """The source loss on a batch of source inputs per step.

    Inputs without labels are learned as the pretrained network answers them, with all its doubts
    (cross-entropy with its probabilities).

    Args:
        model: at the pretrained weights.
        samples: source inputs.
        batch_size: source samples per step; all of them where there are fewer.
        seed: of their order.

    Raises:
        ValueError: labels that the source head cannot give.
    """

    in_loss = False  # the loss of a run is the target's

    def __init__(
        self, *, model: nn.Module, samples: SourceInputs, batch_size: int, seed: int
    ) -> None:
        samples = samples.to(next(model.parameters()).device)
        labels = samples.labels
        if labels is not None:
            num_classes = source_answers(model, samples.part(0, 2)).shape[1]
            check_labels(labels, num_classes, "source_inputs")
        self.answers = source_answers(model, samples).softmax(1) if labels is None else labels
        rows = torch.arange(samples.size)
        data = Data("source_inputs", inputs=samples.inputs, labels=rows)
        self._batches = TrainBatches(data, batch_size, seed)
        self._stream: Iterator[Any] = iter(())
        self._step, self._batch = -1, (None, torch.empty(0))

    def batch(self, step: int) -> tuple[Any, Tensor]:
        """Inputs of a step, and what to answer; they depend on the seed and on `step` alone."""
        if step != self._step:
            if step != self._step + 1 or self._step < 0:
                self._stream = self._batches.from_step(step)
            inputs, rows, _ = next(self._stream)
            self._batch = inputs, self.answers[rows.to(self.answers.device)]
            self._step = step
        return self._batch

    def penalty(self, seen: Seen) -> Tensor | None:
        inputs, answers = self.batch(seen.step)
        n = len(answers)
        rows = slice(n * seen.part // seen.parts, n * (seen.part + 1) // seen.parts)
        if rows.start == rows.stop:
            return None
        inputs = move(pick(inputs, rows), answers.device)
        return replay_loss(seen.model, inputs, answers[rows]) / n


def replay_loss(model: nn.Module, inputs: Any, answers: Tensor) -> Tensor:
    """Sum over samples of the source cross-entropy, in nats.

    Args:
        answers: classes `[B]`, or probabilities in the shape of the source logits.
    """
    with source_task(model):
        logits = classes_second(model, forward_logits(model, inputs).float(), inputs)
    per_sample = F.cross_entropy(logits, answers, reduction="none")
    return per_sample.flatten(1).mean(1).sum() if per_sample.dim() > 1 else per_sample.sum()
