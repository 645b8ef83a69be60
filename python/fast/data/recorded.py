"""The labels and classes that a data set records, found without reading a sample."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import ConcatDataset, Subset, TensorDataset

from fast.data.trees import LABEL_KEYS


def recorded_labels(dataset: Any) -> Any:
    """One label for each sample, as the samples have them; None where they are not recorded.

    Records are `targets` or `labels` (torchvision), after `target_transform`; the last of several
    tensors; a column of a Hugging Face data set; and those of a subset or concatenation.
    """
    if isinstance(dataset, Subset):
        inner = recorded_labels(dataset.dataset)
        return None if inner is None else [_plain(inner)[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [recorded_labels(part) for part in dataset.datasets]
        labels = [label for part in parts if part is not None for label in _plain(part)]
        return labels if len(labels) == len(dataset) else None
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if isinstance(values, Sized) and len(values) == len(dataset):
            transform = getattr(dataset, "target_transform", None)
            return values if transform is None else [transform(v) for v in _plain(values)]
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[-1]
    column = next((key for key in LABEL_KEYS if key in _features(dataset)), None)
    return None if column is None else dataset.with_format(None)[column][:]


def recorded_classes(dataset: Any) -> int | None:
    """How many classes a data set says it has; None where it says nothing, or relabels them."""
    if isinstance(dataset, Subset):
        return recorded_classes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        counts = [recorded_classes(part) for part in dataset.datasets]
        return counts[0] if len(set(counts)) == 1 else None
    classes = getattr(dataset, "classes", None)
    if classes is None:
        features = _features(dataset)
        classes = next(
            (getattr(features[k], "names", None) for k in LABEL_KEYS if k in features), None
        )
    relabelled = getattr(dataset, "target_transform", None) is not None
    return None if classes is None or relabelled else len(classes)


def _features(dataset: Any) -> Any:
    """The columns of a Hugging Face data set, by name; empty for any other."""
    return dataset.features if is_table(dataset) else {}


def is_table(dataset: Any) -> bool:
    """Whether this is a `datasets.Dataset`; the library itself is not imported."""
    return all(hasattr(dataset, name) for name in ("features", "column_names", "with_format"))


def _plain(values: Any) -> Any:
    """The numbers in a tensor, array or Series."""
    return values.tolist() if hasattr(values, "tolist") else values
