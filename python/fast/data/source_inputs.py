"""Source inputs: a few samples of source data, in memory, with or without labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from fast.data.arrays import as_tensor
from fast.data.dataset import map_style
from fast.data.finite import check_finite_inputs
from fast.data.labels import check_labels, whole_labels
from fast.data.stream import TrainBatches
from fast.data.trees import (
    alike,
    concatenate,
    leaves,
    length,
    move,
    pick,
    split_labels,
    without_graph,
)
from fast.errors import counted, first_line, warn

log = logging.getLogger("fast")

# Samples that a run keeps in memory, at most, and their bytes.
LIMIT = 4096
BYTES = 2**28
# Half of the samples are held back to measure on, and the loss of one sample says nothing.
LEAST = 4
NO_CHANCE = 16  # So many labels are not in order by chance.


@dataclass(frozen=True, kw_only=True)
class SourceInputs:
    """Samples of the source task.

    Attributes:
        inputs: a tensor `[N, ...]`, or a tuple or mapping of tensors.
        labels: int64 `[N]`, or None.
    """

    inputs: Any
    labels: Tensor | None = None

    @classmethod
    def parse(cls, data: Any, limit: int, name: str = "source data") -> SourceInputs:
        """Read at most `limit` samples: drawn at random, or the first ones of batches.

        Args:
            data: `SourceInputs`; inputs alone (a tensor, or a tuple or mapping of tensors);
                `(inputs, labels)`; a map-style Dataset; or a DataLoader or another iterable of
                batches, with labels or without. Arrays and tables may take the place of tensors.
                Labels are one-dimensional: this distinguishes `(inputs, labels)` from a tuple of
                two inputs.
            name: what messages call the data.

        Raises:
            TypeError, ValueError: the data are something else, are empty, cannot be read, or have
                labels that are no whole numbers.
        """
        if isinstance(data, SourceInputs):
            return data.part(0, limit)
        inputs: list[Any] = []
        labels: list[Tensor] = []
        count, has_more = 0, False
        try:
            for batch in _batches(data, name, limit):
                if has_more := count == limit:
                    break
                whole, y = _split(batch)
                x = pick(whole, slice(limit - count))
                has_more = length(whole) > length(x)
                inputs.append(x)
                if y is not None:
                    labels.append(torch.as_tensor(y)[: length(x)])
                count += length(x)
                if has_more:
                    break
            if not count:
                raise ValueError("0 samples")
            together = without_graph(concatenate(inputs))
            answers = torch.cat(labels) if len(labels) == len(inputs) else None
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            reason = first_line(error).removeprefix(f"{name}: ").split(";")[0].rstrip(".")
            raise (TypeError if isinstance(error, TypeError) else ValueError)(
                f"{name}: {reason}; give inputs, (inputs, labels), a Dataset or a DataLoader"
            ) from error
        if count < 2:
            raise ValueError(f"{name}: 1 sample; give at least 2")
        if answers is not None:
            answers = whole_labels(answers, name)
            if has_more and count >= NO_CHANCE and _are_sorted(answers):
                warn(
                    f"{name}: sorted by class, and the first {limit} are read, up to class "
                    f"{int(answers[-1])}: shuffle them"
                )
        return cls(inputs=together, labels=answers)

    @property
    def size(self) -> int:
        return length(self.inputs)

    def part(self, start: int, stop: int) -> SourceInputs:
        """Samples `start` to `stop`."""
        rows = slice(start, stop)
        return SourceInputs(
            inputs=pick(self.inputs, rows),
            labels=None if self.labels is None else self.labels[rows],
        )

    def without_labels(self) -> SourceInputs:
        return SourceInputs(inputs=self.inputs)

    def to(self, device: torch.device) -> SourceInputs:
        return SourceInputs(inputs=move(self.inputs, device), labels=move(self.labels, device))

    def batches(self, size: int) -> Iterator[tuple[Any, Tensor | None]]:
        """Inputs and labels of `size` samples at a time, in order."""
        for start in range(0, self.size, size):
            part = self.part(start, start + size)
            yield part.inputs, part.labels


def parse_source_inputs(data: Any) -> SourceInputs:
    """At most `LIMIT` source inputs of a run, on the device where they are.

    The last of them will be held back, so that they are mixed where they are sorted by class.

    Args:
        data: what `SourceInputs.parse` takes.

    Raises:
        TypeError, ValueError: the data are no source inputs, too few, not finite or labelled
            wrongly; the message says which, and names `source_inputs`.
    """
    samples = SourceInputs.parse(data, LIMIT, "source_inputs")
    if samples.size < LEAST:
        raise ValueError(
            f"source_inputs: {counted(samples.size, 'sample')}; give at least {LEAST}, better 500"
        )
    if samples.labels is not None:
        check_labels(samples.labels, None, "source_inputs")
    check_finite_inputs(samples.inputs, "source_inputs")
    return _mixed(samples)


def _mixed(samples: SourceInputs) -> SourceInputs:
    labels = samples.labels
    if labels is None or not _are_sorted(labels):
        return samples
    log.info("source_inputs are sorted by class: they are taken in random order")
    rows = torch.randperm(samples.size, generator=torch.Generator().manual_seed(0))
    return SourceInputs(inputs=pick(samples.inputs, rows), labels=labels[rows.to(labels.device)])


def _are_sorted(labels: Tensor) -> bool:
    """Whether labels of several classes are in order."""
    return bool((labels.diff() >= 0).all()) and int(labels[0]) != int(labels[-1])


def target_inputs(batches: TrainBatches, limit: int) -> SourceInputs:
    """The first training inputs of one shape, in the order of the first epoch, on the CPU.

    Args:
        limit: number of samples after which reading stops, as it does after `BYTES`; the batch
            that reaches it is kept whole. At least `LEAST` samples are read.
    """
    parts: list[Any] = []
    count = size = 0
    for inputs, _, index in batches.once():
        if parts and not alike(parts[0], inputs):  # texts of another length, ...
            continue
        check_finite_inputs(inputs, "train", index)
        parts.append(inputs)
        count += length(inputs)
        size += sum(x.nbytes for x in leaves(inputs))
        if count >= LEAST and (count >= limit or size >= BYTES):
            break
    return SourceInputs(inputs=without_graph(concatenate(parts)))


def _batches(data: Any, name: str, limit: int) -> Iterable[Any]:
    """The batches in source data, in order; of more than `limit` samples these, drawn at random."""
    data = _tensors(data)
    if _is_batch(data):
        count = length(_split(data)[0])
        return [pick(data, drawn_rows(count, limit)) if count > limit else data]
    streams = isinstance(data, IterableDataset) and isinstance(data, Sized)
    dataset = data if streams else map_style(data, name)
    if dataset is not None and not streams:
        dataset = Subset(dataset, drawn_rows(len(dataset), limit).tolist())
    if dataset is not None:
        return DataLoader(dataset, batch_size=min(64, limit))
    if isinstance(data, Iterable):
        return data
    raise TypeError(f"got {type(data).__name__}")


def drawn_rows(count: int, limit: int) -> Tensor:
    """All rows, in order; of more than `limit` so many, in random order: what is sorted by class
    then has all of them."""
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def _tensors(data: Any) -> Any:
    """The same with tensors for arrays and tables."""
    if isinstance(data, np.ndarray) or hasattr(data, "to_numpy"):
        return as_tensor(data, "inputs")
    if isinstance(data, tuple):
        return tuple(map(_tensors, data))
    return {k: _tensors(v) for k, v in data.items()} if type(data) is dict else data


def _is_batch(data: Any) -> bool:
    """Whether this is one batch, and not several of them."""
    if isinstance(data, (Tensor, Mapping)):
        return True
    if not isinstance(data, (tuple, list)) or not data:
        return False
    # A tuple of tensors is several inputs, a list of them is several batches.
    return _ends_in_labels(data) or (isinstance(data, tuple) and isinstance(data[0], Tensor))


def _ends_in_labels(batch: tuple[Any, ...] | list[Any]) -> bool:
    return len(batch) > 1 and isinstance(batch[-1], Tensor) and batch[-1].dim() == 1


def _split(batch: Any) -> tuple[Any, Any]:
    """Inputs of a batch, and its labels or None."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        return split_labels(batch)
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"a batch is a {type(batch).__name__}, not tensors of inputs")
    if len(batch) == 1:
        return batch[0], None
    if not _ends_in_labels(batch):
        return tuple(batch), None
    inputs, labels = batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]
    if length(inputs) != len(labels):
        raise ValueError(f"{length(inputs)} inputs but {len(labels)} labels")
    return inputs, labels
