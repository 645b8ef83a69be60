"""The fields of a source card, checked one by one: the file may be a stranger's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from fast.curvature.operators.fisher_diagonal import LABELS

# Estimated slopes of nats over energy lie between 0.5 and 2; steeper ones overflow.
STEEPEST = 10.0
FINGERPRINT = re.compile(r"[0-9a-f]{16}")


class CardError(ValueError):
    """A field or tensor that no card has; the message names it."""


def read_facts(text: str) -> dict[str, Any]:
    """All fields of a card except its entries, and `shapes`; points are tuples.

    Raises:
        CardError: the text is no JSON, a field is missing or unknown, or has an impossible value.
    """
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CardError("its description is no JSON, or nested too deeply") from error
    facts = _fields(facts, FACTS, "")
    if facts["shapes"].keys() != facts["fingerprints"].keys():
        raise CardError("its shapes and fingerprints are of different tensors")
    points = facts["calibration"]["points"]
    facts["calibration"]["points"] = tuple(tuple(p) for p in points)
    return facts


def _fields(fields: Any, checks: dict[str, Callable[[Any], bool]], inside: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise CardError(f"{inside or 'its description'} is no mapping")
    if differing := sorted(fields.keys() ^ checks.keys()):
        what = "unknown" if differing[0] in fields else "missing"
        raise CardError(f"field {differing[0]!r} is {what}")
    for name, check in checks.items():
        if not check(fields[name]):
            raise CardError(f"{name} cannot be {_short(fields[name])}")
    return fields


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is a number between the limits; integers too large for a float are not."""
    return _number(value) and -1e300 < value < 1e300 and least <= value <= most


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _optional(value: Any, check: Callable[[Any], bool]) -> bool:
    return value is None or check(value)


def _named(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(check, value.values()))


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(_whole(n, 0) for n in value)


def _points(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(p, list) and len(p) == 2 and all(map(_number, p)) for p in value
    )


CALIBRATION: dict[str, Callable[[Any], bool]] = {
    "scale": lambda v: _finite(v, 0),
    "exponent": lambda v: _finite(v, 0, STEEPEST) and v > 0,
    "spread": lambda v: _finite(v, 1),
    "coherence": _number,
    "points": _points,
}
FACTS: dict[str, Callable[[Any], bool]] = {
    "fingerprints": lambda v: _named(
        v, lambda f: isinstance(f, str) and FINGERPRINT.fullmatch(f) is not None
    ),
    "shapes": lambda v: _named(v, _shape),
    "num_samples": lambda v: _whole(v, 2),
    "labels": lambda v: v in LABELS,
    "temperature": lambda v: _finite(v, 0) and v > 0,
    "calibration": lambda v: bool(_fields(v, CALIBRATION, "calibration")),
    "source_loss": lambda v: _optional(v, _number),
    "source_accuracy": lambda v: _optional(v, lambda a: _finite(a, 0, 1)),
    "seconds": lambda v: _finite(v, 0),
}
