"""Replay, the plain baseline: train on old data beside the new.

Experience replay (Chaudhry et al. 2019, arXiv 1902.10486; Rolnick et al. 2019, arXiv 1811.11682):
each step also takes a batch of source inputs through the network and adds their loss. It keeps the
source well, and costs twice the work per step.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fast.adapt.guards.base import Guard, Seen
from fast.data.labels import check_labels
from fast.data.source_inputs import SourceInputs
from fast.data.stream import StepRows
from fast.data.trees import move, pick
from fast.heads import forward_logits, source_task
from fast.heads.class_axis import classes_second
from fast.heads.outputs import source_logits
from fast.ranks import ALONE, Ranks


class Replay(Guard):
    """The source loss on a batch of source inputs per step.

    Without labels, the target of an input is the pretrained network's own probabilities
    (cross-entropy with soft labels).

    Args:
        model: the network at its pretrained weights.
        samples: source inputs.
        batch_size: source samples per step; all of them where there are fewer.
        seed: seed of their order.
        ranks: processes that share the inputs of a step.

    Raises:
        ValueError: labels are out of the source head's range.
    """

    in_loss = False  # the loss of a run is the target's

    def __init__(
        self,
        *,
        model: nn.Module,
        samples: SourceInputs,
        batch_size: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        samples = samples.to(next(model.parameters()).device)
        labels = samples.labels
        if labels is not None:
            num_classes = source_logits(model, samples.part(0, 2)).shape[1]
            check_labels(labels, num_classes, "source_inputs")
        self.answers = source_logits(model, samples).softmax(1) if labels is None else labels
        self.inputs = samples.inputs
        self._ranks = ranks
        self._rows = StepRows(len(self.answers), batch_size, seed)
        self._step = -1  # that `_batch` is of
        self._batch: tuple[Any, Tensor] = (None, self.answers)
        self._total = 0.0  # what a sum over the batch is divided by

    def batch(self, step: int) -> tuple[Any, Tensor]:
        """This rank's share of the inputs of a step, and the answers to learn.

        The whole step's inputs depend on the seed and on `step` alone.
        """
        if step != self._step:
            rows = self._rows.at(step)
            self._total, rows = len(rows) / self._ranks.size, rows[self._ranks.share]
            answers = self.answers[rows.to(self.answers.device)]
            self._batch = pick(self.inputs, rows), answers
            self._step = step
        return self._batch

    def penalty(self, seen: Seen) -> Tensor | None:
        inputs, answers = self.batch(seen.step)
        n = len(answers)
        part, parts = seen.batch.part, seen.batch.parts
        rows = slice(n * part // parts, n * (part + 1) // parts)
        if rows.start == rows.stop:
            return None
        inputs = move(pick(inputs, rows), answers.device)
        return replay_loss(seen.model, inputs, answers[rows]) / self._total


def replay_loss(model: nn.Module, inputs: Any, answers: Tensor) -> Tensor:
    """Sum over samples of the source cross-entropy, in nats.

    Args:
        answers: classes `[B]`, or probabilities in the shape of the source logits.
    """
    with source_task(model):
        logits = classes_second(model, forward_logits(model, inputs).float(), inputs)
    per_sample = F.cross_entropy(logits, answers, reduction="none")
    return per_sample.flatten(1).mean(1).sum() if per_sample.dim() > 1 else per_sample.sum()
