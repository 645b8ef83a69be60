"""The few figures of a record that a line or a progress bar shows."""

from __future__ import annotations

from typing import Any

from fast.adapt.result import Record
from fast.progress import bar


def progress_bar(show: bool | None, start: int, steps: int, method: str) -> Any:
    """The bar of a run, which stays; see `fast.progress`."""
    return bar(steps, method, show, unit="step", start=start, leave=True)


def figures(record: Record, before: float | None = None, between: str = " ") -> str:
    """The few figures that a progress bar has room for: what is kept, then what is learned.

    Args:
        before: source accuracy at the pretrained weights.
        between: the separator.
    """
    parts = []
    if (source := record.get("source_accuracy")) is not None:
        change = "" if before is None else f" ({100 * (source - before):+z.1f})"
        parts.append(f"source {100 * source:.1f}{change}")
    if (forecast := record.get("forecast")) is not None:
        parts.append(f"forgets {forecast:z.2f}")
    if (target := record.get("target_accuracy")) is not None:
        parts.append(f"target {100 * target:.1f}")
    return between.join(parts)


def line(record: Record, steps: int, epochs: float, before: float | None) -> str:
    """An evaluation as a line of the log.

    Args:
        steps: steps of the whole run.
        epochs: passes over the training data so far.
        before: source accuracy at the pretrained weights.
    """
    loss = "" if record["loss"] is None else f", loss {record['loss']:.4g}"
    rest = f"{loss}, {record['seconds']:.0f} s"
    text = figures(record, before, ", ") or "nothing is measured"
    return f"step {record['step']}/{steps} (epoch {epochs:.1f}): {text}{rest}"
