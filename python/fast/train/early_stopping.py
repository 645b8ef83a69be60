"""Stop when the validation accuracy no longer improves, and go back to the best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast.files import atomic_file
from fast.train.checkpoint import load_tensors, save_tensors

BEST_FILE = "best.safetensors"


class EarlyStopping:
    """Keeps the weights with the best `target_accuracy`; the earliest of equals.

    Args:
        patience: evaluations without a better one after which to stop; None never stops and keeps
            nothing.
        folder: where the best weights are kept for a resumed run, or None.
    """

    def __init__(self, patience: int | None, folder: Path | None) -> None:
        self.patience, self.folder = patience, folder
        self.best: dict[str, Any] | None = None
        self.weights: dict[str, Tensor] | None = None
        self.since_best = 0

    def update(self, record: dict[str, Any], model: nn.Module) -> None:
        if self.patience is None:
            return
        if self.best and record["target_accuracy"] <= self.best["target_accuracy"]:
            self.since_best += 1
            return
        self.best, self.since_best = record, 0
        self.weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        if self.folder is not None:
            self._write(self.folder)

    def _write(self, folder: Path) -> None:
        assert self.weights is not None
        with atomic_file(folder / BEST_FILE) as path:
            save_tensors(self.weights, path)

    @property
    def stop(self) -> bool:
        return self.patience is not None and self.since_best >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Put the best weights back into the model."""
        if self.weights is not None:
            model.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "since_best": self.since_best}

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from the state of a run whose best weights are in `folder`."""
        self.best, self.since_best = state["best"], state["since_best"]
        if self.best is None:
            return
        self.weights = load_tensors(folder / BEST_FILE)
        if self.folder is not None and self.folder.resolve() != folder.resolve():
            # A later resume looks for them here.
            self._write(self.folder)
