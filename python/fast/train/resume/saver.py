"""Save the checkpoints of a run, and resume it from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast.adapt.adaptation import Adaptation
from fast.adapt.state import TRAINING_DATA
from fast.curvature.card import SourceCard
from fast.data.generators import find_generators
from fast.models.identity import (
    card_identity,
    code_identity,
    data_identity,
    environment,
    model_identity,
)
from fast.models.saved.claim import run_of
from fast.train.config import TrainConfig
from fast.train.resume.checkpoint import (
    Facts,
    LiveRun,
    Snapshot,
    load_checkpoint,
    save_checkpoint,
)
from fast.train.resume.run_folder import RunFolder
from fast.train.run_data import RunData


class Saver:
    """Checkpoints of one run, tied to its network, data and options.

    Args:
        folder: the run's folder.
        model: the network at its pretrained weights.
    """

    def __init__(
        self, folder: RunFolder, config: TrainConfig, model: nn.Module, data: RunData
    ) -> None:
        self.folder, self.config = folder, config
        self._ranks = folder.ranks
        self._environment = environment(next(model.parameters()).device, data.transform)
        self._environment["processes"] = str(self._ranks.size)
        self._generators = find_generators(model=model, **data.roots)
        self._job: dict[str, Any] = {
            "training samples": data.train.num_samples,
            "classes": data.num_classes,
            **code_identity(model, data.transform),
            "pretrained weights (hash)": model_identity(model),
            "validation data (hash)": data_identity(data.val),
            "source data (hash)": data_identity(data.source),
        }

    def add_source(self, adaptation: Adaptation, card: SourceCard | None) -> None:
        """Add the data of the adaptation, and the user's card, to the facts of the job."""
        self._job[TRAINING_DATA] = adaptation.facts[TRAINING_DATA]
        self._job["source inputs (hash)"] = data_identity(adaptation.source)
        self._job["held-back source inputs (hash)"] = data_identity(adaptation.held_back)
        self._job["card"] = None if card is None else card_identity(card)

    def save(self, adaptation: Adaptation, record: dict[str, Any], best: dict[str, Tensor]) -> None:
        """Write a checkpoint; see `save_checkpoint`."""
        self.folder.check()
        facts, live = self._facts(self.folder.run), self._live(adaptation)
        randomness = self._ranks.all(live.randomness())
        snapshot = Snapshot.of(live, best, keep=self._ranks.first)
        with self._ranks.together():
            if self._ranks.first:
                save_checkpoint(self.folder.path, snapshot, facts, record, randomness=randomness)

    def load(self, adaptation: Adaptation) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
        """Restore the newest checkpoint; see `load_checkpoint`."""
        source = self.folder.source
        assert source is not None
        live, facts = self._live(adaptation), self._facts(run_of(source))
        with self._ranks.together():
            return load_checkpoint(source, live, facts, rank=self._ranks.rank)

    def _live(self, adaptation: Adaptation) -> LiveRun:
        return LiveRun(adaptation=adaptation, generators=self._generators)

    def _facts(self, run: str) -> Facts:
        return Facts(
            run=run,
            options=self.config.computed(),
            job=self._job,
            environment=self._environment,
        )
