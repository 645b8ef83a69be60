"""Arrays, tables and lists as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.labels import NUMBER_THEM
from fast.data.trees import leaves
from fast.errors import warn

# The first images of a set show in which units all of them are.
FEW = 64


def as_tensor(values: Any, name: str) -> Tensor:
    """Values as a tensor.

    Tensors stay as they are. Float64 arrays, pandas tables and lists take torch's default
    precision, unsigned integers become int64.

    Raises:
        TypeError: the values are no real numbers, or rows differ in length.
    """
    original = values
    if isinstance(values, Mapping):  # of which the keys would be taken for the values
        raise TypeError(
            f"{name} must be numbers, as a tensor or array; got {type(values).__name__}"
        )
    if hasattr(values, "to_numpy"):  # in the order of rows; a table's index does not count
        values = values.to_numpy()
    elif not isinstance(values, (Tensor, np.ndarray, list, tuple)) and hasattr(values, "__len__"):
        values = list(values)
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        # Files hold types and byte orders that torch does not have.
        kind = "int64" if values.dtype.kind == "u" and values.itemsize > 1 else values.dtype.char
        values = values.astype("float64" if kind == "g" else kind, copy=not values.flags.writeable)
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be numbers, as a tensor or array; got {_what(original, values)}"
            + (f"; {NUMBER_THEM}" if name.endswith("labels") and _are_names(values) else "")
        ) from error
    if tensor.is_complex():
        raise TypeError(f"{name} must be real numbers; got {tensor.dtype}: give two real columns")
    if isinstance(values, Tensor):
        return values
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def warn_unscaled(inputs: Any, name: str) -> None:
    """Warn where float images `[N, ...]` are in 0..255: no network was trained on those."""
    for x in leaves(inputs):
        dense = x.layout == torch.strided and not x.is_meta
        if not dense or x.dim() < 3 or not x.is_floating_point() or not x.numel():
            continue
        few = x[:FEW]
        low, high = few.min(), few.max()
        if low >= 0 and 32 < high <= 255 and (few == few.round()).all():
            warn(
                f"{name}: inputs are whole numbers in 0..{int(high)}: a pretrained network wants "
                "images in 0..1 and normalised as it was trained, (x / 255 - mean) / std",
            )


def _are_names(values: Any) -> bool:
    return len(values) > 0 and isinstance(values[0], str)


def _what(original: Any, values: Any) -> str:
    if isinstance(values, np.ndarray):
        kind = str(values.dtype)
        if values.dtype == object and values.size:
            kind = type(values.flat[0]).__name__
    else:
        kind = type(values[0]).__name__ if len(values) else "nothing"
    return f"{type(original).__name__} of {kind}"
