"""What a network says about source inputs: the logits of its source head, and what that sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fast.data.source_inputs import SourceInputs
from fast.heads.class_axis import classes_second
from fast.heads.find import find_head
from fast.heads.forward import evaluating, forward_logits
from fast.heads.replace import task_head
from fast.heads.task import source_task


@torch.no_grad()
def source_logits(model: nn.Module, data: SourceInputs, batch_size: int = 128) -> Tensor:
    """Source logits `[N, C, ...]` in float32, in evaluation mode, with the weights as they are."""
    with evaluating(model), source_task(model):
        logits = [forward_logits(model, x).float() for x, _ in data.batches(batch_size)]
        return classes_second(model, torch.cat(logits), data.part(0, 2).inputs)


@torch.no_grad()
def source_features(model: nn.Module, data: SourceInputs, batch_size: int = 128) -> Tensor:
    """What the head sees `[N, D]`, in float32, in evaluation mode; averaged over positions."""
    head = task_head(model)
    watched = head if head is not None else find_head(model, data.part(0, 2).inputs).module
    seen: list[Tensor] = []
    hook = watched.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
    try:
        with evaluating(model), source_task(model):
            for x, _ in data.batches(batch_size):
                forward_logits(model, x)
    finally:
        hook.remove()
    # A convolution's channels come first, a linear layer's features last.
    layer = head.source if head is not None else watched
    rows = [x.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1) for x in seen]
    return torch.cat([x.flatten(1, -2).mean(1) if x.dim() > 2 else x for x in rows])
