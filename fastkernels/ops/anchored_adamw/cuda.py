"""AdamW with a pull towards an anchor: csrc/cuda/anchored.cu."""

from __future__ import annotations

from fastkernels import _update, _update_cuda


def anchored_adamw_(batch: _update.Batch) -> None:
    """Update every tensor of `batch` in place."""
    _update_cuda.run(batch, "adamw")
