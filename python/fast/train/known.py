"""Source inputs as they come: what is wrong with them is said before anything is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fast.curvature.answers import SourceInputs, source_answers
from fast.errors import first_line
from fast.heads import evaluating, forward_logits, pick, source_task
from fast.inputs import check_finite_inputs, taking
from fast.train.data import move
from fast.train.labels import check_labels

# Kept in memory, at most.
LIMIT = 4096
# Half of them are held back, and a loss of one sample says nothing.
LEAST = 4


def known_inputs(model: nn.Module, data: Any) -> SourceInputs:
    """The first `LIMIT` source inputs, on the CPU or wherever they are.

    Args:
        model: answers the source task.
        data: what `SourceInputs` takes; or arrays in the tensors' place.

    Raises:
        TypeError, ValueError: they are no source inputs, too few, not finite, labelled wrongly, or
            not what the network takes; the message says which, and names `source_inputs`.
    """
    data = _tensors(data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        _check_pair(*data)
    try:
        samples = SourceInputs(data, LIMIT)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = first_line(error).removeprefix("source data: ").split(";")[0].rstrip(".")
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"source_inputs: {reason}; give inputs, (inputs, labels), a Dataset or a DataLoader"
        ) from error
    if samples.size < LEAST:
        raise ValueError(
            f"source_inputs: {samples.size} samples; give at least {LEAST}, better 500"
        )
    if samples.labels is not None:
        check_labels(samples.labels, None, "source_inputs")
    check_finite_inputs(samples.inputs, "source_inputs")
    with taking("source_inputs", samples.inputs):
        _try(model, samples)
    return samples


def classes_of_source(model: nn.Module, samples: SourceInputs) -> int:
    """Number of classes that the source head can answer."""
    device = next(model.parameters()).device
    return source_answers(model, samples.part(0, 2).to(device)).shape[1]


def _tensors(data: Any) -> Any:
    """Arrays as tensors, in torch's default precision where they are float64."""
    if isinstance(data, np.ndarray):
        tensor = torch.as_tensor(data)
        return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
    if isinstance(data, tuple):
        return tuple(_tensors(x) for x in data)
    return {k: _tensors(v) for k, v in data.items()} if type(data) is dict else data


def _check_pair(inputs: Any, labels: Any) -> None:
    """What looks like labels must be labels: else it would be taken for a second input."""
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        return
    check_labels(labels, None, "source_inputs")
    if isinstance(inputs, Tensor) and inputs.dim() > 1 and len(inputs) != len(labels):
        raise ValueError(f"source_inputs: {len(inputs)} inputs but {len(labels)} labels")


@torch.no_grad()
def _try(model: nn.Module, samples: SourceInputs) -> Tensor:
    device = next(model.parameters()).device
    with evaluating(model), source_task(model):
        return forward_logits(model, move(pick(samples.inputs, slice(2)), device))
