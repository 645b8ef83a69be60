"""What an adaptation gives back."""

from __future__ import annotations

import copy
import dataclasses
import html
import importlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast.adapt.config import AdaptConfig
from fast.adapt.plan import Plan
from fast.figures import run_figure
from fast.files import atomic_file, clear_unfinished, to_json, write_json
from fast.heads import (
    adapter_state,
    adapters,
    fold_head,
    places_of,
    source_norms,
    task_head,
    unwrap,
)
from fast.models.claim import is_going_on
from fast.models.description import describe_network, save_library_config
from fast.models.preparation import Preparation
from fast.models.saved import (
    ADAPTERS_FILE,
    MODEL_FILE,
    OPTIONS_FILE,
    SOURCE_HEAD_FILE,
    SOURCE_NORMS_FILE,
    write_manifest,
)
from fast.tensor_files import save_tensors

log = logging.getLogger("fast")


@dataclass(kw_only=True, repr=False)
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
        plan: the settings that the options came to.
        source_accuracy_before: of the pretrained network, before anything was changed.
        run: id of the run, where it had a folder.
        data: what the command line read: classes, samples of each, preprocessing.
        network: what --model named, by which the network is built again.
        preparation: what pictures and texts go through on their way to the network.
        inputs: shapes and types of the network's inputs (`fast.models.signature`).
        by_class: for each class, how many samples of `val` are answered right, and how many there
            are; of the weights in `model`.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    config: AdaptConfig
    source_accuracy_before: float | None = None
    classes: list[str] | None = field(default=None)
    chosen: dict[str, Any] | None = None
    plan: Plan | None = None
    run: str | None = None
    data: dict[str, Any] | None = None
    network: str | None = None
    preparation: Preparation = field(default_factory=Preparation)
    inputs: Any = None
    by_class: tuple[list[int], list[int]] | None = None

    @property
    def lr(self) -> float:
        """The peak learning rate of the backbone."""
        assert self.plan is not None
        return self.plan.lr

    @property
    def final(self) -> dict[str, Any]:
        """The record of the weights in `model`: the last; or the best one under early stopping; or
        the first, where training has made the head start worse on `val`."""
        return self.chosen or self.history[-1]

    @property
    def target_accuracy(self) -> float | None:
        """Accuracy on `val`, or None without one."""
        return self.final["target_accuracy"]

    @property
    def source_accuracy(self) -> float | None:
        """Accuracy on `source` with the source head, or None without source data."""
        return self.final["source_accuracy"]

    def plot(self) -> Any:
        """The matplotlib Figure of the run: target and source accuracy, and the forecast, over the
        steps. In a notebook it shows after `%matplotlib inline`; `figure.savefig` writes it.

        Raises:
            ValueError: nothing was measured.
            ImportError: matplotlib is not installed.
        """
        budget = self.config.budget
        return run_figure(
            self.history,
            self.config.method,
            source_before=self.source_accuracy_before,
            forecast_in_points=budget is not None and budget.points,
        )

    def predict(self, inputs: Any, **options: Any) -> Any:
        """Classes of inputs with their probabilities: see `fast.deploy.Predictor.predict`."""
        return self._predictor().predict(inputs, **options)

    def evaluate(self, data: Any, **options: Any) -> Any:
        """How good the answers to labelled data are: see `fast.deploy.Predictor.evaluate`."""
        return self._predictor().evaluate(data, **options)

    def export(self, folder: str | Path, format: str, **options: Any) -> Path:
        """Write the network for use without this library: see `fast.deploy.Predictor.export`."""
        return self._predictor().export(folder, format, **options)

    def _predictor(self) -> Any:
        # The package is above this one, and nothing here depends on it before somebody asks.
        return importlib.import_module("fast.deploy.load").predictor_of(self)

    def _facts(self) -> dict[str, str]:
        """What the run came to, for those who look at it."""
        final = self.final
        facts = {"model": type(self.model).__name__, "method": self.config.method}
        if self.plan is not None:
            facts["tasks"] = self.plan.tasks
        facts["step"] = str(final["step"])
        for name in ("target_accuracy", "source_accuracy"):
            if final[name] is not None:
                facts[name] = f"{final[name]:.4f}"
        if self.source_accuracy_before is not None:
            facts["source_accuracy_before"] = f"{self.source_accuracy_before:.4f}"
        return facts

    def __repr__(self) -> str:
        return f"Result({', '.join(f'{name}={fact}' for name, fact in self._facts().items())})"

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{name}</th><td>{html.escape(fact)}</td></tr>"
            for name, fact in self._facts().items()
        )
        return f"<table><caption>Result</caption>{''.join(rows)}</table>"

    @property
    def notes(self) -> list[str]:
        """What `model.safetensors` has that the plain architecture of as many classes has not."""
        model = unwrap(self.model)
        head = task_head(model)
        if head is None:
            return []
        name = places_of(model, head)[0][2]
        notes = []
        if head.source.bias is None and head.linear.bias is not None:
            notes.append(
                f"{name} has a bias (the mean of the features is part of it), and the network's "
                f"own head has none: give it one before loading, or {name}.bias is lost"
            )
        if head.auxiliary:
            notes.append(
                f"{', '.join(head.auxiliary)}: auxiliary heads keep the source's classes; give "
                "them as many before loading"
            )
        if self.plan is not None and self.plan.adapter_rank:
            notes.append(
                f"{self.plan.functions}: {MODEL_FILE} answers the target alone; the source's are "
                "in the files beside it"
            )
        return notes

    def merge_adapters(self) -> nn.Module:
        """Make `model` the plain network of the target alone, in place: `fast.fold_head`.

        Each adapter is added to the weight of its layer, so that a pass costs what it cost before
        adapting; the source task is then forgotten, and the log says so.

        Returns:
            `model`.

        Raises:
            ValueError: there are no adapters.
        """
        if not adapters(self.model):
            raise ValueError("the model has no adapters: method='adapter' makes them")
        log.info("adapters are merged into the weights: the network answers the target task alone")
        return fold_head(self.model)

    def join(self, **how: Any) -> Any:
        """One network for the source's classes and the target's: see `fast.join`."""
        # It is built upon this layer, and comes when it is asked for.
        return importlib.import_module("fast.merge.join").join(self, **how)

    def save(self, folder: str | Path) -> Path:
        """Write the model and how it was made; each file whole or not at all.

        `model.safetensors` is folded and loads into the plain architecture, with as many classes
        and a bias in its head (the mean of the features becomes part of it);
        `source_head.safetensors` holds weight and bias of the layer that it replaced, and
        `source_norms.safetensors` the source's batch norms where each task has its own;
        `adapters.safetensors`, where there are adapters, for each layer `NAME` that has one the
        source's weight `NAME.weight`, and the factors `NAME.A` and `NAME.B` that are added to it
        (`fast.heads.attach_adapters`); in `model.safetensors` they are merged;
        `fast.json`, `result.json` and `history.jsonl` hold options, accuracies, `plan`, `notes` and
        history; `preprocessing.json` what pictures and texts go through, with the tokenizer beside
        it; `config.json` the architecture of a network of transformers; `data.json` what was read;
        `manifest.json` the hashes of all. `fast.load` reads it.

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
                save_tensors(_plain_layer(head.source), path)
        per_task = {SOURCE_NORMS_FILE: source_norms(model), ADAPTERS_FILE: adapter_state(model)}
        for name, tensors in per_task.items():
            if not tensors:  # of a run before
                (folder / name).unlink(missing_ok=True)
                continue
            with atomic_file(folder / name) as path:
                save_tensors(_plain_names(tensors), path)
        with atomic_file(folder / MODEL_FILE) as path:
            save_tensors(_plain_names(fold_head(copy.deepcopy(model)).state_dict()), path)
        save_library_config(model, folder, self.classes)
        write_json(folder / OPTIONS_FILE, dataclasses.asdict(self.config))
        self.preparation.save(folder)
        write_json(
            folder / "result.json",
            {
                "target_accuracy": self.target_accuracy,
                "source_accuracy": self.source_accuracy,
                "source_accuracy_before": self.source_accuracy_before,
                "classes": self.classes,
                "final": self.final,
                "plan": dataclasses.asdict(self.plan) if self.plan else None,
                "notes": self.notes,
                "network": describe_network(model, self.network),
                "inputs": self.inputs,
            },
        )
        if self.data is not None:
            write_json(folder / "data.json", self.data)
        with atomic_file(folder / "history.jsonl") as path:
            path.write_text("".join(to_json(r) + "\n" for r in self.history))
        write_manifest(folder, self.run, self.config.computed())
        return folder


def _plain_layer(layer: nn.Module) -> dict[str, Tensor]:
    """Weight and bias, also where they are computed of others (weight norm)."""
    tensors = {"weight": layer.weight, "bias": layer.bias}
    return {name: x for name, x in tensors.items() if isinstance(x, Tensor)}


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of a network as it is without `torch.compile` around its parts."""
    return {name.replace("_orig_mod.", ""): x for name, x in state.items()}
