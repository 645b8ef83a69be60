"""Inputs of a network, whatever they are: a tensor, or tuples and mappings of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fast.errors import first_line


def leaves(inputs: Any) -> list[Tensor]:
    """The tensors in inputs, in order."""
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, (tuple, list)):
        return [x for part in inputs for x in leaves(part)]
    return [inputs] if isinstance(inputs, Tensor) else []


def plain(inputs: Any) -> Any:
    """The same with dicts for mappings of any other kind, which torch's trees do not know."""
    if isinstance(inputs, Mapping):
        return {k: plain(v) for k, v in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(plain(v) for v in inputs)
    return inputs


def kind(x: Any) -> str:
    """What it is, for messages."""
    return f"{type(x).__name__}" + (f" of shape {list(x.shape)}" if isinstance(x, Tensor) else "")


def shapes(inputs: Any) -> str:
    """Shapes and types, for messages."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{k} {shapes(v)}" for k, v in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(map(shapes, inputs))
    return f"{list(inputs.shape)} {inputs.dtype}" if isinstance(inputs, Tensor) else kind(inputs)


@contextmanager
def taking(name: str, inputs: Any) -> Iterator[None]:
    """Name the data in what a network raises that does not take them.

    Raises:
        ValueError: in place of an error of shape, type or number of inputs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{name}: the network does not take these inputs ({shapes(inputs)}): "
            f"{first_line(error)}"
        ) from error


def broken_rows(inputs: Any) -> Tensor | None:
    """Which samples hold a number that is not finite, bool `[N]`; None of whole numbers."""
    rows: Tensor | None = None
    for x in leaves(inputs):
        if x.is_floating_point():
            found = ~x.isfinite().flatten(1).all(1) if x.dim() > 1 else ~x.isfinite()
            rows = found if rows is None else rows | found
    return rows


def check_finite_inputs(inputs: Any, name: str) -> None:
    """Raise ValueError where a sample holds a number that is not finite."""
    rows = broken_rows(inputs)
    if rows is not None and rows.any():
        raise ValueError(
            f"{name}: {int(rows.sum())} samples are not finite (NaN or infinite), the first is "
            f"number {int(rows.nonzero()[0])}; drop them"
        )
