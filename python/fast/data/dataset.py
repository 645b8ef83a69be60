"""The data of a run, whether they are tensors, a Dataset or a DataLoader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from fast.data.arrays import as_tensor, warn_unscaled
from fast.data.finite import check_finite_inputs
from fast.data.generators import find_generators, reseed, seed_process
from fast.data.labels import NUMBER_THEM, check_labels, count_classes
from fast.data.recorded import is_table, recorded_classes, recorded_labels
from fast.data.trees import (
    LABEL_KEYS,
    kind,
    leaves,
    length,
    pick,
    shapes,
    split_labels,
    without_graph,
)
from fast.errors import counted, first_line, printable, some, warn
from fast.workers import in_workers

# The way out for data that can be read only once, in an order of their own.
_STREAMS = (
    "give some thousands of its samples, (inputs, labels). A loop around fast.Adaptation may train "
    "on the stream itself, which needs only these to begin with"
)


def split_batch(batch: Any, name: str) -> tuple[Any, Tensor]:
    """(inputs, labels) of a batch: a pair, a longer tuple that ends in labels, or a mapping.

    Raises:
        TypeError: the batch has no labels; the message says what came.
    """
    if isinstance(batch, Mapping):
        named, labels = split_labels(batch)
        if labels is not None:
            return named, _label_tensor(labels, name, "one number for each sample")
        raise TypeError(
            f"{name}: a batch is a mapping without labels (keys: {', '.join(map(str, batch))}); "
            f"call them one of {', '.join(LABEL_KEYS)}"
        )
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        way = "(inputs, label), or several inputs and then the label"
        return inputs, _label_tensor(batch[-1], name, way)
    raise TypeError(f"{name}: a batch must be (inputs, labels) or a mapping; got {kind(batch)}")


def _label_tensor(labels: Any, name: str, way: str) -> Tensor:
    """Collated labels as a tensor.

    Raises:
        TypeError: they are names, or no labels; `way` says what to give.
    """
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        last = labels[0] if isinstance(labels, (list, tuple)) and labels else labels
        hint = f"; where these are the names of classes, {NUMBER_THEM}" if type(last) is str else ""
        raise TypeError(
            f"{name}: a sample ends in {kind(last)}, where its label is expected; give {way}{hint}"
        ) from error


@dataclass(kw_only=True)
class Data:
    """A data set: either inputs and labels in memory, or a Dataset, or a DataLoader; see `as_data`.

    Attributes:
        name: train, val or source, as messages call it.
        inputs, labels: all samples and their labels `[N]`, where they are in memory.
        dataset: a map-style Dataset.
        loader: a DataLoader.
        workers: processes that read samples of `dataset`; 0 reads them here.
        pinned: workers put batches into page-locked memory.
    """

    name: str
    inputs: Any = None
    labels: Tensor | None = None
    dataset: Dataset[Any] | None = None
    loader: DataLoader[Any] | None = None
    workers: int = 0
    pinned: bool = False

    @property
    def num_samples(self) -> int | None:
        if self.labels is not None:
            return len(self.labels)
        return len(self._source) if isinstance(self._source, Sized) else None

    @property
    def has_views(self) -> bool:
        """Whether the data set shows a sample differently at each visit: `view(i, seed)` is a
        sample that depends on its arguments alone, and `dataset[i]` the sample as it is."""
        return hasattr(self.dataset, "view")

    @property
    def _source(self) -> Any:
        return self.dataset if self.dataset is not None else cast(Any, self.loader).dataset

    def check_trainable(self) -> None:
        """Raise ValueError where one cannot train on these data, as far as they are in memory."""
        if self.num_samples == 1:
            raise ValueError(f"{self.name}: 1 sample; give at least 2, of two classes")
        for x in leaves(self.inputs):
            if x.is_meta or x.layout != torch.strided:
                form = "on the meta device" if x.is_meta else f"of layout {x.layout}"
                raise ValueError(f"{self.name}: inputs {form}; give dense tensors, x.to_dense()")
            if x.is_inference():
                raise ValueError(
                    f"{self.name}: inputs were made under torch.inference_mode; give x.clone()"
                )
        check_finite_inputs(self.inputs, self.name)

    def recorded_targets(self) -> Any:
        """The labels that a data set records beside its samples, or None."""
        try:
            return recorded_labels(self._source)
        except Exception as error:
            raise ValueError(
                f"{self.name}: reading the labels raised {type(error).__name__}: "
                f"{printable(first_line(error))}"
            ) from error

    def batch_at(self, index: Tensor, seeds: list[int] | None = None) -> tuple[Any, Tensor]:
        """Inputs and labels of the samples `index` `[B]`; a DataLoader cannot give them.

        Args:
            seeds: the seed of each sample's view, where the data set has views; None reads the
                samples as they are.
        """
        if self.labels is not None:
            return pick(self.inputs, index), self.labels[index]
        rows = index.tolist()
        views = seeds if seeds is not None and self.has_views else [None] * len(rows)
        samples = [(i, self._sample(i, seed)) for i, seed in zip(rows, views, strict=True)]
        return split_batch(self._collated(samples), self.name)

    def batches_at(
        self, keys: Iterable[tuple[Tensor, list[int] | None]]
    ) -> Iterator[tuple[Any, Tensor]]:
        """`batch_at` of each (index, seeds), in order, read ahead by `workers`."""
        generators = find_generators(data=self.dataset).values() if self.workers else ()

        def read(key: tuple[Tensor, list[int] | None]) -> tuple[Any, Tensor]:
            if key[1] is not None and self.workers and not self.has_views:
                # What a data set draws does not depend on which worker reads the batch.
                seed_process(key[1][0])
                for generator in generators:
                    reseed(generator, key[1][0])
            return self.batch_at(*key)

        workers = self.workers if self.labels is None else 0
        yield from in_workers(read, keys, workers, pinned=self.pinned)

    def _sample(self, i: int, seed: int | None) -> Any:
        dataset = cast(Any, self.dataset)
        try:
            return dataset[i] if seed is None else dataset.view(i, seed)
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

    def eval_batches(
        self, batch_size: int, share: slice = slice(None)
    ) -> Iterator[tuple[Any, Tensor]]:
        """Every sample once, in order.

        Args:
            share: which of the batches are read.
        """
        if self.loader is not None:
            batches = read_loader(self.loader, self.name)
            for batch in itertools.islice(batches, share.start, share.stop, share.step):
                yield split_batch(batch, self.name)
            return
        n = cast(int, self.num_samples)
        starts = range(0, n, batch_size)[share]
        rows = (torch.arange(start, min(start + batch_size, n)) for start in starts)
        yield from self.batches_at((index, None) for index in rows)

    def infer_num_classes(self) -> int:
        """The number of classes: what the data set records, else one more than its largest label.

        Raises:
            ValueError: one would have to read all samples (pass num_classes), or the labels are no
                class indices.
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
            warn(
                f"{self.name}: no sample of {counted(len(missing), 'class', 'classes')} "
                f"({some(missing)}), and labels up to {count - 1}: the head has {count} classes; "
                "number them from 0, or pass num_classes=",
            )
        return count


def as_data(data: Any, name: str, *, any_labels: bool = False) -> Data:
    """Accept (x, y) tensors (x may be a mapping or tuple), a Dataset, or a DataLoader.

    Args:
        any_labels: whether labels need not be class indices.

    Raises:
        TypeError: `data` is something else.
        ValueError: there are no samples, or not as many labels as inputs.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            raise TypeError(f"{name}: the DataLoader reads an IterableDataset; {_STREAMS}")
        if not len(data):
            raise ValueError(f"{name}: the DataLoader gives no batches")
        return Data(name=name, loader=data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        inputs, labels = data
        in_memory = _in_memory(inputs, labels, name, any_labels)
        if name == "train":
            warn_unscaled(in_memory.inputs, name)
        return in_memory
    if isinstance(data, (IterableDataset, Iterator)):
        raise TypeError(f"{name} is a stream, {kind(data)}, which cannot be read again; {_STREAMS}")
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
    return Data(name=name, dataset=dataset)


def _in_memory(inputs: Any, labels: Any, name: str, any_labels: bool) -> Data:
    _warn_of_another_index(inputs, labels, name)
    labels = as_tensor(labels, f"{name}: labels")
    if not isinstance(inputs, (Mapping, tuple, list)):
        inputs = as_tensor(inputs, f"{name}: inputs")
    if isinstance(inputs, (list, tuple)) and any(isinstance(x, str) for x in inputs):
        raise TypeError(
            f"{name}: inputs are texts, and the network takes tensors: "
            "tokenizer(texts, padding=True, truncation=True, return_tensors='pt').data"
        )
    counts = [len(x) for x in leaves(inputs)]
    if len(set(counts)) > 1:
        raise ValueError(
            f"{name}: inputs differ in their number of samples: {', '.join(map(str, counts))}"
        )
    if length(inputs) != len(labels):
        raise ValueError(f"{name}: {length(inputs)} inputs but {len(labels)} labels")
    if not len(labels):
        raise ValueError(f"{name}: no samples")
    if not any_labels:
        labels = check_labels(labels, None, name)
    return Data(name=name, inputs=without_graph(inputs), labels=labels)


def _warn_of_another_index(inputs: Any, labels: Any, name: str) -> None:
    """Warn where pandas would match the rows of inputs and labels in another way than in order."""
    own: Any = getattr(inputs, "index", None)
    other: Any = getattr(labels, "index", None)
    if hasattr(own, "equals") and hasattr(other, "equals") and not own.equals(other):
        warn(
            f"{name}: inputs and labels have different indexes, and are matched in the order of "
            "their rows: labels.loc[inputs.index] puts them in that of the inputs"
        )


def map_style(data: Any, name: str) -> Any:
    """`data`, if it is a data set that has a length and gives samples by number, no matter which
    library it comes from; else None.

    Tables of the `datasets` library return tensors, as `with_format("torch")` makes them do.

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
    """Whether a column of a table holds numbers, or lists of them."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _numeric(inner)
    return getattr(feature, "dtype", "").startswith(("int", "uint", "float", "bool"))


def read_loader(loader: DataLoader[Any], name: str) -> Iterator[Any]:
    """The batches of a DataLoader.

    Raises:
        ValueError: the loader raised something; the message names the data.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(
                # A worker's error ends with what went wrong, after its traceback.
                f"{name}: the DataLoader raised {type(error).__name__}: "
                + (str(error).strip().splitlines() or [""])[-1]
            ) from error
        yield batch
