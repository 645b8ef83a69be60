"""Checks of numbers that users pass."""

from __future__ import annotations

import math
from typing import Any


def check_whole(**numbers: Any) -> None:
    """Raise ValueError for the first that is no whole number."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number; got {value!r}")


def check_finite(**numbers: Any) -> None:
    """Raise ValueError for the first that is no finite number."""
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
