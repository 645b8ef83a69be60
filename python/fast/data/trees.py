"""Inputs of a network, whatever they are: a tensor, or tuples and mappings of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fast.errors import first_line

# Samples looked at together: what is computed of them takes memory.
CHUNK = 4096


def leaves(inputs: Any) -> list[Tensor]:
    """The tensors in inputs, in order."""
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, (tuple, list)):
        return [x for part in inputs for x in leaves(part)]
    return [inputs] if isinstance(inputs, Tensor) else []


def mapped(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """Inputs of the same form with `function` of each tensor; all else as it is."""
    if isinstance(inputs, Mapping):
        return {k: mapped(v, function) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(mapped(v, function) for v in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else inputs


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
def taking(name: str, inputs: Any, model: nn.Module | None = None) -> Iterator[None]:
    """Name the data in what a network raises that does not take them.

    Args:
        model: to say what it takes.

    Raises:
        ValueError: in place of what the forward raises of shape, type or number of inputs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        hint = "" if model is None else mismatch(model, inputs)
        raise ValueError(
            f"{name}: the network does not take these inputs ({shapes(inputs)}): "
            f"{first_line(error)}{hint}"
        ) from error


def mismatch(model: nn.Module, inputs: Any) -> str:
    """What a network takes, where these inputs are plainly something else; else nothing."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = getattr(model, "main_input_name", next(iter(parameters), ""))
    found = leaves(inputs)
    if found and found[0].dim() == 4 and named in ("input_ids", "ids", "tokens"):
        return f"; it is a text network (it takes {named}), and these look like images"
    if found and not found[0].is_floating_point() and named in ("pixel_values", "input_values"):
        return f"; it takes {named}, numbers with a fraction, and these are whole numbers"
    if isinstance(inputs, Mapping) and (named not in inputs or not set(inputs) <= set(parameters)):
        if not takes_all:
            return f"; its forward takes ({', '.join(parameters)}): give the data these names"
        if named not in inputs:
            return f"; it takes {named}"
    return ""


def broken_rows(inputs: Any) -> Tensor | None:
    """Which samples hold a number that is not finite, bool `[N]`; None of whole numbers."""
    rows: Tensor | None = None
    for x in leaves(inputs):
        if x.is_floating_point() and x.dim():
            parts = [~p.isfinite().flatten(1).all(1) for p in x.unsqueeze(-1).split(CHUNK)]
            found = torch.cat(parts)
            rows = found if rows is None else rows | found
    return rows


def check_finite_inputs(inputs: Any, name: str, numbers: Tensor | None = None) -> None:
    """Raise ValueError where a sample holds a number that is not finite.

    Args:
        numbers: of the samples in the data, `[B]` (default: counted from 0 in these inputs).
    """
    rows = broken_rows(inputs)
    if rows is not None and rows.any():
        first = rows.nonzero()[0]
        raise ValueError(
            f"{name}: {int(rows.sum())} samples are not finite (NaN or infinite), the first is "
            f"number {int(first if numbers is None else numbers[first.cpu()])}; drop them"
        )
