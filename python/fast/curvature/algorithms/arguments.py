"""Checks of the numbers that users pass."""

from __future__ import annotations

import math
from typing import Any


def check_whole(*, least: int | None = None, **numbers: Any) -> None:
    """Raise ValueError, naming the argument, unless all are whole numbers of at least `least`."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number; got {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def check_finite(**numbers: Any) -> None:
    """Raise ValueError, naming the argument, unless all are finite numbers."""
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
