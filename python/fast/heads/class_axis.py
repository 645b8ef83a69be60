"""Which dimension of its logits a network has its classes in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fast.heads.find import classes_of, find_head
from fast.heads.replace import task_head


def class_dim(model: nn.Module, logits: Tensor, sample: Any) -> int:
    """The dimension of `logits` that holds the classes.

    Linear heads put classes last, `[N, ..., C]`; convolutions, and networks that transpose for
    torch's cross-entropy, second, `[N, C, ...]`. Where both are as long as the head is wide, the
    kind of the head decides.

    Args:
        sample: inputs, to find the head by.
    """
    if logits.dim() <= 2:
        return 1
    head = task_head(model)
    try:
        layer = head.source if head is not None else find_head(model, sample).module
    except ValueError:  # without a linear head, torch's own order is likely
        return 1
    places = (logits.dim() - 1, 1) if isinstance(layer, nn.Linear) else (1, logits.dim() - 1)
    return next((d for d in places if logits.shape[d] == classes_of(layer)), places[0])


def classes_second(model: nn.Module, logits: Tensor, sample: Any) -> Tensor:
    """Logits of any network as `[N, C, ...]`; see `class_dim`."""
    return logits.movedim(class_dim(model, logits, sample), 1)
