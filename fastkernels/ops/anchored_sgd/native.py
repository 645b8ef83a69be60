"""SGD with a pull towards an anchor: csrc/cpu/anchored.cpp."""

from __future__ import annotations

from fastkernels import _update, _update_native


def anchored_sgd_(batch: _update.Batch) -> None:
    """Update every tensor of `batch` in place."""
    _update_native.run(batch, "sgd")
