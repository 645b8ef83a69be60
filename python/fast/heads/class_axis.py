"""Find the dimension of a network's logits that holds the classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fast.data.trees import pick
from fast.heads.find import HeadLayer, classes_of, find_head
from fast.heads.forward import check_logits, forward_logits, hooked
from fast.heads.replace import task_head


def class_dim(model: nn.Module, logits: Tensor, sample: Any) -> int:
    """The dimension of `logits` that holds the classes.

    Linear heads put classes last, `[N, ..., C]`; convolutions, and networks that transpose for
    torch's cross-entropy, second, `[N, C, ...]`. If both dimensions have as many entries as the
    head has outputs, the head's own output shows whether the network transposes it.

    Args:
        sample: inputs, to find the head by.

    Raises:
        ValueError: the logits have one dimension; or they have more than two, and the network has
            neither a linear head nor a convolution.
    """
    check_logits(logits)
    if logits.dim() == 2:
        return 1
    head = task_head(model)
    try:
        layer = head.source if head is not None else find_head(model, sample).module
    except ValueError as error:
        if any(isinstance(m, _ConvNd) for m in model.modules()):
            return 1
        raise ValueError(
            f"logits are {list(logits.shape)}, and which dimension holds the classes cannot be "
            f"told: {type(model).__name__} has no linear head. Give batches (x, y) with labels, "
            "whose shape tells, or make the head an nn.Linear"
        ) from error
    last = logits.dim() - 1
    places = (last, 1) if isinstance(layer, nn.Linear) else (1, last)
    fitting = [d for d in places if logits.shape[d] == classes_of(layer)]
    if len(fitting) == 2 and _moves_classes(model, layer, sample):
        return places[1]
    return fitting[0] if fitting else places[0]


@torch.no_grad()
def _moves_classes(model: nn.Module, layer: HeadLayer, sample: Any) -> bool:
    """Whether the logits are the head's output with its classes in the other dimension."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, output: outputs.append(output.clone()))
    with hooked(model, hook):
        logits = forward_logits(model, pick(sample, slice(2)))
    classes_moved = logits.movedim(*((1, -1) if isinstance(layer, nn.Linear) else (-1, 1)))
    # Similar, not equal: a network may scale the output of its head.
    return any(_alike(o, classes_moved) > _alike(o, logits) for o in outputs)


def _alike(a: Tensor, b: Tensor) -> float:
    """Cosine between two tensors; -1 where their shapes differ."""
    if a.shape != b.shape:
        return -1.0
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def classes_second(model: nn.Module, logits: Tensor, sample: Any) -> Tensor:
    """Logits of any network as `[N, C, ...]`; see `class_dim`."""
    return logits.movedim(class_dim(model, logits, sample), 1)
