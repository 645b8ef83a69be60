"""What a fine-tuning run gives back."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fast.curvature.network import unwrap
from fast.files import atomic_file, clear_unfinished, to_json, write_json
from fast.heads import fold_head, source_norms, task_head
from fast.train.checkpoint import save_tensors
from fast.train.config import TrainConfig
from fast.train.logs import HISTORY_FILE
from fast.train.run_folder import is_going_on, options_of
from fast.train.saved import MODEL_FILE, SOURCE_HEAD_FILE, SOURCE_NORMS_FILE, write_manifest


@dataclass
class Result:
    """A fine-tuned model and how it got there.

    Attributes:
        model: the adapted network, in evaluation mode, with the source head inside
            (`fast.fold_head` makes it plain).
        history: one record per evaluation: step, loss (mean over the steps since the last record,
            nats: the target's, with the penalties of distillation and rehearsal, without the loss
            of replayed inputs), target_accuracy, target_loss, source_accuracy, source_loss, drift
            (`||w - w0||`), forgetting (source accuracy lost so far), forecast (of the rise of
            source loss, nats, or of the accuracy lost under a budget in points; with a card or
            source inputs; what is measured at a check), grad_norm, lr, seconds. What was not
            measured is None.
        config: the options of the run, as they were given.
        lr: the peak learning rate of the backbone.
        source_accuracy_before: of the pretrained network, before anything was changed.
        run: id of the run, where it had a folder.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    config: TrainConfig
    lr: float
    source_accuracy_before: float | None = None
    classes: list[str] | None = field(default=None)
    chosen: dict[str, Any] | None = None
    run: str | None = None

    @property
    def final(self) -> dict[str, Any]:
        """The record of the weights in `model`: the last, or the best one under early stopping."""
        return self.chosen or self.history[-1]

    @property
    def target_accuracy(self) -> float | None:
        """Accuracy on `val`, or None without one."""
        return self.final["target_accuracy"]

    @property
    def source_accuracy(self) -> float | None:
        """Accuracy on `source` with the source head, or None without source data."""
        return self.final["source_accuracy"]

    def save(self, folder: str | Path) -> Path:
        """Write the model and how it was made; each file whole or not at all.

        `model.safetensors` is folded and loads into the plain architecture, with as many classes
        and a bias in its head (the mean of the features becomes part of it);
        `source_head.safetensors` holds weight and bias of the layer that it replaced, and
        `source_norms.safetensors` the source's batch norms where each task has its own;
        `config.json`, `result.json` and `history.jsonl` hold options, accuracies and history;
        `manifest.json` the hashes of all.

        Returns:
            the folder.

        Raises:
            ValueError: a run is going on there.
        """
        folder = Path(folder)
        if is_going_on(folder):
            raise ValueError(f"{folder}: a run is going on there; name another folder")
        clear_unfinished(folder)
        model = unwrap(self.model)
        head = task_head(model)
        if head is not None:
            with atomic_file(folder / SOURCE_HEAD_FILE) as path:
                save_tensors(dict(head.source.state_dict()), path)
        norms = source_norms(model)
        if norms:
            with atomic_file(folder / SOURCE_NORMS_FILE) as path:
                save_tensors(norms, path)
        else:  # of a run before
            (folder / SOURCE_NORMS_FILE).unlink(missing_ok=True)
        with atomic_file(folder / MODEL_FILE) as path:
            save_tensors(dict(fold_head(copy.deepcopy(model)).state_dict()), path)
        write_json(folder / "config.json", dataclasses.asdict(self.config))
        write_json(
            folder / "result.json",
            {
                "target_accuracy": self.target_accuracy,
                "source_accuracy": self.source_accuracy,
                "source_accuracy_before": self.source_accuracy_before,
                "classes": self.classes,
                "final": self.final,
            },
        )
        with atomic_file(folder / HISTORY_FILE) as path:
            path.write_text("".join(to_json(r) + "\n" for r in self.history))
        write_manifest(folder, self.run, options_of(self.config))
        return folder
