"""How far the features of source inputs are from what they were, as a loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.adapt.guards.rehearse import STEEPEST, TOLERANCE
from fast.data.source_inputs import SourceInputs
from fast.data.stream import row_batches
from fast.data.trees import length, pick
from fast.heads import by_sample, features_of, forward_logits, source_task, task_head

CHUNK = 128


class SourceFeatures:
    """The features of source inputs at the weights before fine-tuning.

    Args:
        model: at these weights.
        samples: on its device.
    """

    def __init__(self, model: nn.Module, samples: SourceInputs) -> None:
        self.samples = samples
        head = task_head(model)
        assert head is not None
        with source_task(model), torch.no_grad():
            parts = [
                by_sample(features_of(model, head, x), length(x)) for x, _ in samples.batches(CHUNK)
            ]
        self.before = torch.cat(parts)
        self.scale = 1 / self.before.var(0).mean().clamp_min(1e-12)

    def distance(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`e = |f - f0|^2 / variance of f0` of these samples `[B]`, with gradients."""
        head = task_head(model)
        assert head is not None
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with source_task(model):
                forward_logits(model, pick(self.samples.inputs, rows))
        finally:
            hook.remove()
        before = self.before[rows]
        now = by_sample(seen[-1], len(rows))
        return self.scale * (now - before).square().flatten(1).mean(1)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Rows of samples, without end."""
        for rows in row_batches(self.samples.size, size, seed):
            yield rows.to(self.before.device)


def pull(e: Tensor) -> Tensor:
    """The penalty of rehearsal on distances `[B]`, see `fast.adapt.guards.rehearse`."""
    zero = torch.zeros_like(e)
    return F.huber_loss(e, zero, delta=STEEPEST * TOLERANCE) / TOLERANCE
