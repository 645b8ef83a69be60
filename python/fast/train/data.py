"""Training and evaluation batches from tensors, Datasets and DataLoaders, in an order that can
resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fast.curvature.answers import LABEL_KEYS
from fast.heads import pick
from fast.inputs import kind, leaves
from fast.train.generators import find_generators, held, reseed
from fast.train.labels import check_labels, count_classes
from fast.train.reachable import GENERATORS
from fast.train.seeding import seeded


def split_batch(batch: Any, name: str) -> tuple[Any, Tensor]:
    """(inputs, labels) of a batch: a pair, a longer tuple that ends in labels, or a mapping.

    Raises:
        TypeError: no labels in it; the message says what came.
    """
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, torch.as_tensor(batch[key])
        raise TypeError(
            f"{name}: a batch is a mapping without labels (keys: {', '.join(map(str, batch))}); "
            f"call them one of {', '.join(LABEL_KEYS)}"
        )
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return inputs, torch.as_tensor(batch[-1])
    raise TypeError(f"{name}: a batch must be (inputs, labels) or a mapping; got {kind(batch)}")


def move(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Mapping):
        return {k: move(v, device) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(move(v, device) for v in inputs)
    return inputs.to(device, non_blocking=True) if isinstance(inputs, Tensor) else inputs


def length(inputs: Any) -> int:
    """Number of rows of a tensor, or of the first tensor in a tuple or mapping."""
    first = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs), None)
    return len(inputs) if isinstance(inputs, Tensor) else len(cast(Sized, first))


@dataclass
class Data:
    """One data set, whatever it came as; made by `as_data`.

    Attributes:
        name: for messages: train, val or source.
        inputs, labels: in memory; else None.
        dataset: a map-style `Dataset`; else None.
        loader: the user's `DataLoader`; else None.
    """

    name: str
    inputs: Any = None
    labels: Tensor | None = None
    dataset: Dataset[Any] | None = None
    loader: DataLoader[Any] | None = None

    @property
    def num_samples(self) -> int | None:
        if self.labels is not None:
            return len(self.labels)
        return len(self._source) if isinstance(self._source, Sized) else None

    @property
    def _source(self) -> Any:
        return self.dataset if self.dataset is not None else cast(Any, self.loader).dataset

    def recorded_targets(self) -> Any:
        """The labels that a data set keeps as `targets` or `labels` (torchvision), or None."""
        return getattr(self._source, "targets", getattr(self._source, "labels", None))

    def batch_at(self, index: Tensor) -> tuple[Any, Tensor]:
        """Inputs and labels of these rows (in memory or map-style only)."""
        if self.labels is not None:
            return pick(self.inputs, index), self.labels[index]
        rows = [cast(Any, self.dataset)[int(i)] for i in index]
        return split_batch(default_collate(rows), self.name)

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Any, Tensor]]:
        """Every sample once, in order."""
        if self.loader is not None:
            for batch in self.loader:
                yield split_batch(batch, self.name)
            return
        n = cast(int, self.num_samples)
        for start in range(0, n, batch_size):
            yield self.batch_at(torch.arange(start, min(start + batch_size, n)))

    def infer_num_classes(self) -> int:
        """Number of classes, from the labels or from the data set's own record of them.

        Raises:
            ValueError: it cannot be told without reading everything; pass num_classes. Or labels
                that are no class indices.
        """
        if self.labels is not None:
            top = int(check_labels(self.labels, None, self.name).max())
            return count_classes(top, len(self.labels), self.name)
        source = self._source
        classes = getattr(source, "classes", None)
        if classes is not None:
            return len(classes)
        targets = self.recorded_targets()
        if targets is not None:
            return count_classes(int(torch.as_tensor(targets).max()), len(targets), self.name)
        raise ValueError(
            f"num_classes is not given and {type(source).__name__} has neither `classes` nor "
            "`targets`; pass num_classes="
        )


def as_data(data: Any, name: str) -> Data:
    """Accept (x, y) tensors (x may be a mapping or tuple), a Dataset, or a DataLoader.

    Raises:
        TypeError: something else; ValueError: empty, or lengths that differ.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            raise TypeError(f"{name}: the DataLoader reads an IterableDataset; use a map-style one")
        if not len(data):
            raise ValueError(f"{name}: the DataLoader gives no batches")
        return Data(name, loader=data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        inputs, labels = data
        labels = _tensor(labels, f"{name}: labels")
        if not isinstance(inputs, (Mapping, tuple, list)):
            inputs = _tensor(inputs, f"{name}: inputs")
        counts = [len(x) for x in leaves(inputs)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{name}: inputs differ in their number of samples: {', '.join(map(str, counts))}"
            )
        count = length(inputs)
        if count != len(labels):
            raise ValueError(f"{name}: {count} inputs but {len(labels)} labels")
        if not len(labels):
            raise ValueError(f"{name}: no samples")
        return Data(name, inputs=inputs, labels=check_labels(labels, None, name))
    iterable = isinstance(data, IterableDataset)
    if isinstance(data, Dataset) and isinstance(data, Sized) and not iterable:
        if not len(data):
            raise ValueError(f"{name}: the data set is empty")
        return Data(name, dataset=data)
    raise TypeError(
        f"{name} must be (inputs, labels), a map-style Dataset or a DataLoader; got {kind(data)}"
    )


def _tensor(values: Any, name: str) -> Tensor:
    """Tensors as they are; arrays and lists in torch's default precision where they are float64.

    Raises:
        TypeError: what came cannot be a tensor (strings, ragged lists).
    """
    if isinstance(values, Tensor):
        return values
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        got = f"{type(values).__name__} of {type(values[0]).__name__}"
        raise TypeError(f"{name} must be numbers, as a tensor or array; got {got}") from error
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


class TrainBatches:
    """The endless stream of training batches; batch `step` depends on the seed and on `step` alone.

    A full batch always: the tail of an epoch is left to the next shuffle. A user's DataLoader keeps
    its own batches; its shuffling is made repeatable by seeding torch with (seed, epoch) as it
    starts, and the generators that it and its samplers have of their own; resuming reads and drops
    what was used.
    """

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self.data, self.seed = data, seed
        # Of a loader's own batches, where it says so.
        self.given_size: int | None = None
        if data.loader is not None:
            self.steps_per_epoch = len(data.loader)
            made = data.loader.batch_size or getattr(data.loader.batch_sampler, "batch_size", None)
            self.given_size = made if isinstance(made, int) else None
        else:
            self.batch_size = min(batch_size, cast(int, data.num_samples))
            self.steps_per_epoch = cast(int, data.num_samples) // self.batch_size

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Batches from `step` on: inputs, labels, and row numbers `[B]` (None from a loader)."""
        epoch, skip = divmod(step, self.steps_per_epoch)
        while True:
            # Hashed: torch's CPU generator takes 64 bits of seed and uses the lower 32.
            seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
            if self.data.loader is not None:
                for batch in self._loader_epoch(self.data.loader, seed, skip):
                    yield *split_batch(batch, self.data.name), None
            else:
                order = self._order(seed)
                for i in range(skip, self.steps_per_epoch):
                    index = order[i * self.batch_size : (i + 1) * self.batch_size]
                    yield *self.data.batch_at(index), index
            epoch, skip = epoch + 1, 0

    def _order(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(cast(int, self.data.num_samples), generator=generator)

    def _loader_epoch(self, loader: DataLoader[Any], seed: int, skip: int) -> Iterator[Any]:
        # The sampler draws its seed with the first batch. Neither that nor reading again what was
        # used may move the generators of the run: a resumed run has restored them already.
        own = find_generators(loader=loader).values() if skip else []
        with seeded(seed), held(own):
            for owner in _sampling(loader):
                for value in vars(owner).values():
                    if isinstance(value, GENERATORS):
                        reseed(value, seed)
            iterator = iter(loader)
            first = next(iterator)
            for _ in range(skip - 1):
                next(iterator)
        if skip == 0:
            yield first
        yield from iterator


def _sampling(loader: DataLoader[Any]) -> list[Any]:
    """All that has a say in which samples a loader gives: itself, its samplers, and theirs."""
    found: list[Any] = [loader]
    for owner in found:
        for name in ("sampler", "batch_sampler"):
            inner = getattr(owner, name, None)
            if (
                inner is not None
                and hasattr(inner, "__dict__")
                and all(inner is not o for o in found)
            ):
                found.append(inner)
    return found


Transform = Callable[[Any], Any]
