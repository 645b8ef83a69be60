"""Training and evaluation batches from tensors, Datasets and DataLoaders, in an order that can
resume."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
)

from fast.curvature.card.answers import LABEL_KEYS
from fast.data.arrays import as_tensor, warn_unscaled
from fast.data.generators import find_generators, held, reseed
from fast.data.labels import check_labels, count_classes
from fast.data.reachable import GENERATORS
from fast.data.recorded import is_table, recorded_classes, recorded_labels
from fast.data.seeding import seeded
from fast.data.trees import kind, leaves, shapes
from fast.errors import first_line, printable, some
from fast.heads import pick


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
        try:
            return inputs, torch.as_tensor(batch[-1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name}: a sample ends in {_first_kind(batch[-1])}, where its label is expected; "
                "give (inputs, label), or several inputs and then the label"
            ) from error
    raise TypeError(f"{name}: a batch must be (inputs, labels) or a mapping; got {kind(batch)}")


def _first_kind(values: Any) -> str:
    """What the first of a batch is."""
    return kind(values[0]) if isinstance(values, (list, tuple)) and values else kind(values)


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
        """The labels that a data set keeps beside its samples, or None."""
        try:
            return recorded_labels(self._source)
        except Exception as error:
            raise ValueError(
                f"{self.name}: reading the labels raised {type(error).__name__}: "
                f"{printable(first_line(error))}"
            ) from error

    def batch_at(self, index: Tensor) -> tuple[Any, Tensor]:
        """Inputs and labels of these rows (in memory or map-style only)."""
        if self.labels is not None:
            return pick(self.inputs, index), self.labels[index]
        return split_batch(
            self._collated([(i, self._sample(i)) for i in index.tolist()]), self.name
        )

    def _sample(self, i: int) -> Any:
        try:
            return cast(Any, self.dataset)[i]
        except Exception as error:
            raise ValueError(
                f"{self.name}: sample {i} cannot be read: {type(error).__name__}: "
                f"{printable(first_line(error))}"
            ) from error

    def _collated(self, samples: list[tuple[int, Any]]) -> Any:
        try:
            return default_collate([sample for _, sample in samples])
        except (RuntimeError, TypeError, KeyError, ValueError) as error:
            (first, a), *others = samples
            for i, b in others:
                if shapes(a) != shapes(b):
                    raise ValueError(
                        f"{self.name}: samples {first} and {i} do not fit into one batch: "
                        f"({shapes(a)}) and ({shapes(b)}); make them alike"
                    ) from error
            raise TypeError(
                f"{self.name}: sample {first} is ({shapes(a)}); give tensors, arrays or numbers"
            ) from error

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Any, Tensor]]:
        """Every sample once, in order."""
        if self.loader is not None:
            for batch in _from_loader(iter(self.loader), self.name):
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
        labels = self.labels
        if labels is None:
            classes = recorded_classes(self._source)
            if classes is not None:
                return classes
            labels = self.recorded_targets()
        if labels is None:
            raise ValueError(
                f"{self.name}: num_classes is not given and {type(self._source).__name__} has "
                "neither `classes` nor one of `targets` for each sample; pass num_classes="
            )
        labels = check_labels(labels, None, self.name)
        count = count_classes(int(labels.max()), len(labels), self.name)
        missing = sorted(set(range(count)) - set(labels.unique().tolist()))
        if missing:
            warnings.warn(
                f"{self.name}: no sample of {len(missing)} classes ({some(missing)}), and labels "
                f"up to {count - 1}: the head has {count} classes; number them from 0, or pass "
                "num_classes=",
                stacklevel=2,
            )
        return count


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
        labels = as_tensor(labels, f"{name}: labels")
        if not isinstance(inputs, (Mapping, tuple, list)):
            inputs = as_tensor(inputs, f"{name}: inputs")
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
        if name == "train":
            warn_unscaled(inputs, name)
        return Data(name, inputs=inputs, labels=check_labels(labels, None, name))
    dataset = map_style(data, name)
    if dataset is None:
        raise TypeError(
            f"{name} must be (inputs, labels), a map-style Dataset or a DataLoader; got "
            f"{kind(data)}"
            + (f" of {some(list(data))}: pass one of them" if isinstance(data, Mapping) else "")
        )
    if not len(dataset):
        raise ValueError(f"{name}: the data set is empty")
    if name == "train" and isinstance(dataset, TensorDataset):
        warn_unscaled(dataset.tensors[0], name)
    return Data(name, dataset=dataset)


def map_style(data: Any, name: str) -> Any:
    """A data set with `len` and samples by number, of torch or of another library; None where
    `data` is something else.

    A table of the `datasets` library gives tensors, as `with_format("torch")` does.

    Raises:
        TypeError: a column of the table holds texts or pictures.
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return None
    if isinstance(data, (str, bytes, list, tuple, Mapping, np.ndarray, Tensor, IterableDataset)):
        return None
    if hasattr(data, "to_numpy"):  # a table of inputs alone
        return None
    if not is_table(data) or data.format["type"] == "custom":
        return data
    raw = [c for c in data.format["columns"] if not _numeric(data.features[c])]
    if raw:
        raise TypeError(
            f"{name}: columns of the Dataset hold no numbers: {some(raw)}; make inputs of them "
            "(map, with_transform) and drop them (remove_columns)"
        )
    return data if data.format["type"] == "torch" else data.with_format("torch")


def _numeric(feature: Any) -> bool:
    """Of a column of the `datasets` library: numbers, or lists of them."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _numeric(inner)
    return getattr(feature, "dtype", "").startswith(("int", "uint", "float", "bool"))


def _from_loader(batches: Iterator[Any], name: str) -> Iterator[Any]:
    """Batches of a DataLoader; what its data set raises names the data."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(
                f"{name}: the DataLoader raised {type(error).__name__}: {_last_line(error)}"
            ) from error
        yield batch


def _last_line(error: Exception) -> str:
    """A worker's error ends with what went wrong, after its traceback."""
    return (str(error).strip().splitlines() or [""])[-1]


class TrainBatches:
    """The endless stream of training batches; batch `step` depends on the seed and on `step` alone.

    Every batch is full, and every epoch uses every sample: the shuffled epochs follow each other
    without a seam, so one batch may hold the end of an epoch and the beginning of the next. A
    user's DataLoader keeps its own batches; its shuffling is made repeatable by seeding torch with
    (seed, epoch) as it starts, and the generators that it and its samplers have of their own;
    resuming reads and drops what was used.

    Attributes:
        batch_size: samples of a batch, at most as many as there are; of a loader what it says.
        given_size: of a loader's own batches.
        steps_per_epoch: batches until every sample was used.
    """

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self.data, self.seed = data, seed
        self.given_size: int | None = None
        if data.loader is not None:
            self.steps_per_epoch = len(data.loader)
            made = data.loader.batch_size or getattr(data.loader.batch_sampler, "batch_size", None)
            if not isinstance(made, int):  # a sampler of the user's: the first batch tells
                made = len(next(self._loader_batches(data.loader, 0))[1])
            self.batch_size = self.given_size = made
        else:
            self.batch_size = min(batch_size, cast(int, data.num_samples))
            self.steps_per_epoch = self.steps_for(1)

    def steps_for(self, epochs: int) -> int:
        """Batches that use every sample `epochs` times."""
        if self.data.loader is not None:
            return epochs * self.steps_per_epoch
        return math.ceil(epochs * cast(int, self.data.num_samples) / self.batch_size)

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Batches from `step` on: inputs, labels, and row numbers `[B]` (None from a loader)."""
        if self.data.loader is not None:
            yield from self._loader_batches(self.data.loader, step)
        epoch, first = divmod(step * self.batch_size, cast(int, self.data.num_samples))
        rows = self._order(epoch)[first:]
        while True:
            while len(rows) < self.batch_size:
                epoch += 1
                rows = torch.cat([rows, self._order(epoch)])
            index, rows = rows[: self.batch_size], rows[self.batch_size :]
            yield *self.data.batch_at(index), index

    def once(self) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """The samples of the first epoch, each once: what `from_step` gives, the last part cut."""
        if self.data.loader is not None:
            yield from itertools.islice(self.from_step(0), self.steps_per_epoch)
            return
        for index in self._order(0).split(self.batch_size):
            yield *self.data.batch_at(index), index

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed_of(epoch))
        return torch.randperm(cast(int, self.data.num_samples), generator=generator)

    def _seed_of(self, epoch: int) -> int:
        # Hashed: torch's CPU generator takes 64 bits of seed and uses the lower 32.
        return int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])

    def _loader_batches(
        self, loader: DataLoader[Any], step: int
    ) -> Iterator[tuple[Any, Tensor, None]]:
        epoch, skip = divmod(step, self.steps_per_epoch)
        while True:
            for batch in self._loader_epoch(loader, self._seed_of(epoch), skip):
                yield *split_batch(batch, self.data.name), None
            epoch, skip = epoch + 1, 0

    def _loader_epoch(self, loader: DataLoader[Any], seed: int, skip: int) -> Iterator[Any]:
        # The sampler draws its seed with the first batch. Neither that nor reading again what was
        # used may move the generators of the run: a resumed run has restored them already.
        own = find_generators(loader=loader).values() if skip else []
        with seeded(seed), held(own):
            for owner in _sampling(loader):
                for value in vars(owner).values():
                    if isinstance(value, GENERATORS):
                        reseed(value, seed)
            iterator = _from_loader(iter(loader), self.data.name)
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
