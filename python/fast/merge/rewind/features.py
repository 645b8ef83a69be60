"""How far the features of source inputs are from what they were, as a loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fast.adapt.guards.rehearse import distances, scale_of
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
        self.scale = scale_of(self.before)

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
        return distances(by_sample(seen[-1], len(rows)), self.before[rows], self.scale)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Rows of samples, without end."""
        for rows in row_batches(self.samples.size, size, seed):
            yield rows.to(self.before.device)
