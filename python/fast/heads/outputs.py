"""The logits of a network's source head on source inputs, and the features that it sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fast.data.source_inputs import SourceInputs
from fast.heads.class_axis import classes_second
from fast.heads.find import find_head
from fast.heads.forward import evaluating, forward_logits
from fast.heads.replace import features_of, task_head
from fast.heads.rows import mean_over_positions
from fast.heads.task import source_task

BATCH_SIZE = 128


@torch.no_grad()
def source_logits(model: nn.Module, data: SourceInputs) -> Tensor:
    """Source logits `[N, C, ...]` in float32, in evaluation mode, at the current weights."""
    with evaluating(model), source_task(model):
        logits = [forward_logits(model, x).float() for x, _ in data.batches(BATCH_SIZE)]
        return classes_second(model, torch.cat(logits), data.part(0, 2).inputs)


@torch.no_grad()
def source_features(model: nn.Module, data: SourceInputs) -> Tensor:
    """The input of the head `[N, D]` in float32, in evaluation mode, averaged over positions."""
    head = task_head(model)
    layer = head.source if head is not None else find_head(model, data.part(0, 2).inputs).module
    with source_task(model):
        batches = [features_of(model, head or layer, x) for x, _ in data.batches(BATCH_SIZE)]
    return torch.cat([mean_over_positions(x.float(), layer) for x in batches])
