"""Source inputs as they come: what is wrong with them is said before anything is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fast.curvature.card.answers import SourceInputs, source_answers
from fast.data.arrays import as_tensor
from fast.data.dataset import TrainBatches, length, map_style, move
from fast.data.labels import check_labels
from fast.data.trees import check_finite_inputs, leaves, taking
from fast.errors import first_line
from fast.heads import evaluating, forward_logits, pick, source_task

# Kept in memory, at most.
LIMIT = 4096
BYTES = 2**28
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
    with taking("source_inputs", samples.inputs, model):
        _try(model, samples)
    return samples


def target_inputs(batches: TrainBatches, limit: int) -> SourceInputs:
    """The first training inputs of one shape, in the order of the first epoch, on the CPU.

    Args:
        limit: samples, at most, but `LEAST`; a batch more, and no more than `BYTES`.
    """
    parts: list[Any] = []
    count = size = 0
    for inputs, _, index in batches.once():
        if parts and not _alike(parts[0], inputs):  # texts of another length, ...
            continue
        check_finite_inputs(inputs, "train", index)
        parts.append(inputs)
        count += length(inputs)
        size += sum(x.nbytes for x in leaves(inputs))
        if count >= max(limit, LEAST) or size >= BYTES:
            break
    return SourceInputs.of(parts)


def _alike(a: Any, b: Any) -> bool:
    """Whether two batches of inputs differ in their number of samples only."""
    first, second = ([(x.shape[1:], x.dtype) for x in leaves(batch)] for batch in (a, b))
    return first == second


def classes_of_source(model: nn.Module, samples: SourceInputs) -> int:
    """Number of classes that the source head can answer."""
    device = next(model.parameters()).device
    return source_answers(model, samples.part(0, 2).to(device)).shape[1]


def _tensors(data: Any) -> Any:
    """Arrays and tables as tensors; data sets of other libraries as torch's loader takes them."""
    if isinstance(data, np.ndarray) or hasattr(data, "to_numpy"):
        return as_tensor(data, "source_inputs")
    if isinstance(data, tuple):
        return tuple(_tensors(x) for x in data)
    if type(data) is dict:
        return {k: _tensors(v) for k, v in data.items()}
    if isinstance(data, (Dataset, SourceInputs, DataLoader)):
        return data
    found = map_style(data, "source_inputs")
    return data if found is None else DataLoader(found, batch_size=64)


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
