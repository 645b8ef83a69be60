"""The records of a run: what is measured after some of its steps."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from fast.adapt.adaptation import Adaptation
from fast.data.dataset import Data
from fast.heads import source_task
from fast.train.engine import Engine
from fast.train.finite import check_finite
from fast.train.metrics import Evaluator, Score, evaluate

LEAST_EVAL_BATCH = 128


class Measure:
    """Measures target and source accuracy of a network.

    Args:
        val, source: data, or None; `source` may be a function of the network.
        batch_size: of a training step.

    Attributes:
        before: of the source, at the pretrained weights; set by `measure_before`, or from a
            checkpoint.
    """

    def __init__(
        self, val: Data | None, source: Data | Evaluator | None, engine: Engine, batch_size: int
    ) -> None:
        self.val, self.source, self.engine = val, source, engine
        self.batch_size = max(LEAST_EVAL_BATCH, batch_size)
        self.before: Score | None = None
        self.started = time.monotonic()

    def measure_before(self, model: nn.Module) -> None:
        self.before = self._source(model)
        self.started = time.monotonic()

    def record(
        self, adaptation: Adaptation, losses: list[Tensor], folder: Any = None
    ) -> dict[str, Any]:
        """Everything that is known after a step, as one line of the history.

        Args:
            losses: of the steps since the last record.
            folder: of the run's checkpoints, for the message when it diverged.
        """
        model, step = adaptation.model, adaptation.done
        loss = check_finite(adaptation, losses, folder)
        target = None
        if self.val is not None:
            with self.engine.autocast():
                target = evaluate(
                    model, self.val, self.batch_size, self.engine.device, self.engine.ranks
                )
        source = self._source(model)
        return {
            "step": step,
            "loss": loss,
            "target_accuracy": target.accuracy if target else None,
            "target_loss": target.loss if target else None,
            "source_accuracy": source.accuracy if source else None,
            "source_loss": source.loss if source else None,
            "forgetting": self.before.accuracy - source.accuracy
            if source and self.before
            else None,
            "forecast": adaptation.forecast(),
            "drift": adaptation.drift(),
            "grad_norm": float(adaptation.stats()["grad_norm"]) if step else None,
            "lr": adaptation.last_lr,
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def _source(self, model: nn.Module) -> Score | None:
        if self.source is None:
            return None
        with source_task(model), self.engine.autocast():
            return evaluate(
                model, self.source, self.batch_size, self.engine.device, self.engine.ranks
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": time.monotonic() - self.started,
            "before": None if self.before is None else list(self.before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = time.monotonic() - float(state["seconds"])
        before = state["before"]
        self.before = None if before is None else Score(*before)
