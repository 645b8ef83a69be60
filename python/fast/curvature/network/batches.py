"""Batches come as one (x, y), a dict with labels, or an iterable that can be read repeatedly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fast.data.trees import LABEL_KEYS, plain, split_labels


class Batch(NamedTuple):
    """The inputs of the model, and the labels or other target of its output (None without)."""

    inputs: Any
    target: Any

    @property
    def size(self) -> int:
        """Number of samples: the first dimension of the first tensor of the inputs."""
        for leaf in pytree.tree_leaves(self.inputs):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return leaf.size(0)  # a nested tensor has no shape
        raise ValueError("a batch needs at least one tensor with a batch dimension in its inputs")

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, with tensors that autograd can save."""
        return Batch(_to(self.inputs, device), _to(self.target, device))


class Batches:
    """The data of an operator: every pass over it gives the same batches.

    Args:
        labels: True where every batch must have labels, False where none is read as such; with
            None a batch may have them.
    """

    def __init__(self, data: Any, labels: bool | None = True):
        self.labels = labels
        if _is_batch(data, labels):
            self._source: Iterable[Any] = [data]
        elif isinstance(data, Iterator):
            # A second product would see no data: an iterator can be read only once.
            self._source = list(data)
        elif isinstance(data, Iterable):
            self._source = data
        else:
            raise TypeError(
                f"data must be a batch (x, y), a dict with {LABEL_KEYS[0]!r}, or an iterable of "
                f"batches; got {type(data).__name__} (a Dataset: wrap it in a DataLoader)"
            )

    @property
    def single(self) -> bool:
        """Whether there is one batch only, which stays in memory."""
        return isinstance(self._source, list) and len(self._source) == 1

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        # A DataLoader draws a seed for its workers from the global generator, even without any.
        before = torch.get_rng_state()
        items = iter(self._source)
        torch.set_rng_state(before)
        for item in items:
            count += 1
            yield _as_batch(item, self.labels)
        if not count:
            raise ValueError("data has no batch: a product over nothing is undefined")


def _is_batch(data: Any, labels: bool | None) -> bool:
    """Whether `data` is one batch, and not several of them."""
    if isinstance(data, Mapping):
        return True
    if not labels and isinstance(data, Tensor):
        return True
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    first, second = data
    if isinstance(first, Tensor):
        # Without labels, [x1, x2] is a list of two inputs, (x, y) is a pair.
        return labels is not False or isinstance(data, tuple)
    parts = Mapping | tuple | list
    return isinstance(first, parts) and not isinstance(second, parts)


def _as_batch(item: Any, labels: bool | None) -> Batch:
    if isinstance(item, Batch):
        return item
    item = plain(item)
    if isinstance(item, Mapping):
        inputs, target = split_labels(item)
        if not labels or len(inputs) < len(item):
            return Batch(inputs, target)
        raise ValueError(f"a dict batch needs one of the keys {LABEL_KEYS}; got {list(item)}")
    if isinstance(item, tuple | list) and len(item) == 2:
        return Batch(item[0], item[1])
    if not labels:
        return Batch(item[0] if isinstance(item, tuple | list) and len(item) == 1 else item, None)
    raise ValueError(
        f"a batch must be (x, y) or a dict with labels; got {type(item).__name__}"
        + (f" of length {len(item)}" if isinstance(item, tuple | list) else "")
    )


def _to(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda t: _usable(t, device) if isinstance(t, Tensor) else t, tree)


def _usable(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy of one from inference mode, which autograd cannot save."""
    return t.clone().to(device) if t.is_inference() else t.to(device)
