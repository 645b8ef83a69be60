"""Stop when the validation accuracy no longer improves, and go back to the best weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fast import dtensor
from fast.adapt.result import Record
from fast.tensor_files import load_into

BEST = "best."


class EarlyStopping:
    """Keeps the weights with the best `target_accuracy`; the earliest of equals.

    Args:
        patience: stop after this many evaluations without a better one; None never stops, and
            keeps nothing.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best: Record | None = None
        self.weights: dict[str, Tensor] = {}
        self.since_best = 0

    def update(self, record: Record, model: nn.Module) -> None:
        if self.patience is None:
            return
        accuracy = record["target_accuracy"]
        best = None if self.best is None else self.best["target_accuracy"]
        assert accuracy is not None, "patience needs val"
        if best is not None and accuracy <= best:
            self.since_best += 1
            return
        self.best, self.since_best = record, 0
        self.weights = {k: _copy(v.detach()) for k, v in model.state_dict().items()}

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation so far, or None."""
        return None if self.best is None else self.best["step"]

    @property
    def stop(self) -> bool:
        return self.patience is not None and self.since_best >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Put the best weights back into the model."""
        if self.weights:
            own = model.state_dict()
            load_into(model, {k: dtensor.as_in(v, own[k]) for k, v in self.weights.items()})

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "since_best": self.since_best}

    def tensors(self) -> dict[str, Tensor]:
        """The best weights so far for a checkpoint, with a prefix before their names."""
        return {BEST + name: value for name, value in self.weights.items()}

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state()` and `tensors()` returned."""
        self.best, self.since_best = state["best"], int(state["since_best"])
        self.weights = {name.removeprefix(BEST): value for name, value in tensors.items()}


def _copy(value: Tensor) -> Tensor:
    """A copy on the CPU; a shard stays on its device, from which it can be gathered."""
    return value.clone() if dtensor.is_sharded(value) else value.cpu().clone()
