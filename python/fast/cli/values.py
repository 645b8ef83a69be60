"""Functions that read the typed value of an option, or say what is wrong with it."""

from __future__ import annotations

import math
import os
from argparse import ArgumentTypeError
from pathlib import Path

from fast.adapt.config import Budget

NORMALISATIONS: dict[str, dict[str, tuple[float, ...]]] = {
    "mean": {"imagenet": (0.485, 0.456, 0.406), "none": (0.0,)},
    "std": {"imagenet": (0.229, 0.224, 0.225), "none": (1.0,)},
}


def folder_name(text: str) -> str:
    """A folder. `~` is the user's home, even after `--output=`, where shells do not expand it."""
    return os.path.expanduser(text)


def model_file(text: str | None) -> Path | None:
    """The file in `path/file.py:Factory(args)`; None for a library's network."""
    name, colon, _ = (text or "").partition(".py:")
    return Path(os.path.expanduser(f"{name}.py")) if colon else None


def share(text: str) -> float:
    """`"0.2"` -> 0.2; a share is at least 0 and less than 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"must be a share from 0 to less than 1, such as 0.2; got {text!r}")
    return value


def at_least_one(text: str) -> int:
    """`"12"` -> 12."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def numbers(text: str) -> tuple[float, ...]:
    """`"0.5,0.4"` -> `(0.5, 0.4)`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"must be numbers separated by commas; got {text!r}") from None


def whole_numbers(text: str) -> tuple[int, ...]:
    """`"0,1,2"` -> `(0, 1, 2)`, without repetitions."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ArgumentTypeError(
            f"must be whole numbers separated by commas; got {text!r}"
        ) from None


def shape(text: str) -> tuple[int, ...]:
    """`"8x3x32x32"` -> `(8, 3, 32, 32)`."""
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ArgumentTypeError(f"must be sizes joined by x, such as 8x3x32x32; got {text!r}")
    return sizes


def names(text: str) -> tuple[str, ...]:
    """`"fast,vanilla"` -> `("fast", "vanilla")`, without repetitions."""
    return tuple(dict.fromkeys(text.split(",")))


def budget_list(text: str) -> tuple[str, ...]:
    """`"0.1,2%"` -> `("0.1", "2%")`."""
    try:
        return tuple(part for part in text.split(",") if Budget.parse(part, "a budget"))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def class_weights(text: str) -> str | tuple[float, ...]:
    """`"balanced"`, or one number for each class."""
    return text if text == "balanced" else numbers(text)


def means(text: str) -> tuple[float, ...]:
    """Numbers, or the name of a normalisation."""
    return NORMALISATIONS["mean"].get(text) or numbers(text)


def stds(text: str) -> tuple[float, ...]:
    """Numbers, or the name of a normalisation."""
    return NORMALISATIONS["std"].get(text) or numbers(text)
