"""Operations on batches of inputs, which may be a tensor, or tuples, lists and mappings of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# A batch that is a mapping has its labels under the first of these keys that it has.
LABEL_KEYS = ("labels", "label", "y", "targets", "target")


def split_labels(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A batch without its labels, and the labels: None if it has none."""
    key = next((key for key in LABEL_KEYS if key in batch), None)
    return {k: v for k, v in batch.items() if k != key}, None if key is None else batch[key]


def leaves(inputs: Any) -> list[Tensor]:
    """The tensors in inputs, in order."""
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, (tuple, list)):
        return [x for part in inputs for x in leaves(part)]
    return [inputs] if isinstance(inputs, Tensor) else []


def mapped(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """The inputs with `function` applied to each tensor; everything else stays as it is."""
    if isinstance(inputs, Mapping):
        return {k: mapped(v, function) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(mapped(v, function) for v in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else inputs


def plain(inputs: Any) -> Any:
    """The inputs with every mapping as a dict: torch's pytrees know no other kind."""
    if isinstance(inputs, Mapping):
        return {k: plain(v) for k, v in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(plain(v) for v in inputs)
    return inputs


def length(inputs: Any) -> int:
    """Number of samples: the rows of a tensor, or of the first one in a tuple or mapping."""
    while isinstance(inputs, Mapping) or _is_several(inputs):
        inputs = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs), ())
    return len(inputs)


def pick(inputs: Any, index: Any) -> Any:
    """The samples `index` (a slice, a number, or a tensor or array of numbers) of a batch."""
    if isinstance(inputs, Mapping):
        return {k: pick(v, index) for k, v in inputs.items()}
    if _is_several(inputs):
        return tuple(pick(v, index) for v in inputs)
    if isinstance(inputs, list) and not isinstance(index, (int, slice)):
        return [inputs[i] for i in index]
    return inputs[index]


def move(inputs: Any, device: torch.device) -> Any:
    """Inputs on a device; a copy to a GPU does not wait."""
    return mapped(inputs, lambda x: x.to(device, non_blocking=device.type != "cpu"))


def without_graph(inputs: Any) -> Any:
    """The same tensors, through which no gradient flows to what they were computed from."""
    return mapped(inputs, Tensor.detach)


def alike(a: Any, b: Any) -> bool:
    """Whether two batches have tensors of the same shapes and types, apart from their length."""
    if isinstance(a, Mapping):
        same = isinstance(b, Mapping) and set(a) == set(b)
        return same and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        same = isinstance(b, (tuple, list)) and len(a) == len(b)
        return same and all(map(alike, a, b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.dim() == b.dim() > 0 and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype


def concatenate(batches: list[Any]) -> Any:
    """Batches as one.

    Raises:
        RuntimeError: they do not fit together.
    """
    first = batches[0]
    if isinstance(first, Mapping):
        return {k: concatenate([batch[k] for batch in batches]) for k in first}
    if isinstance(first, (tuple, list)):
        return tuple(concatenate([batch[i] for batch in batches]) for i in range(len(first)))
    return torch.cat(batches)


def join(a: Any, b: Any) -> Any | None:
    """Two batches as one; None where they do not fit together."""
    return concatenate([a, b]) if alike(a, b) else None


def kind(x: Any) -> str:
    """The type of an object, and the shape of a tensor, for messages."""
    return f"{type(x).__name__}" + (f" of shape {list(x.shape)}" if isinstance(x, Tensor) else "")


def shapes(inputs: Any) -> str:
    """Shapes and types, for messages."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{k} {shapes(v)}" for k, v in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(map(shapes, inputs))
    return f"{list(inputs.shape)} {inputs.dtype}" if isinstance(inputs, Tensor) else kind(inputs)


def _is_several(inputs: Any) -> bool:
    """Whether these are several inputs, and not one input of texts, one text for each sample."""
    return isinstance(inputs, (tuple, list)) and bool(inputs) and not isinstance(inputs[0], str)
