"""What an adaptation gives back."""

from __future__ import annotations

import dataclasses
import html
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from fast.adapt.config import AdaptConfig
from fast.adapt.plan import Plan
from fast.deploy.evaluation import Evaluation
from fast.deploy.predictions import Predictions
from fast.deploy.predictor import Predictor
from fast.deploy.words import ExportFormat
from fast.figures import run_figure
from fast.files import atomic_file, clear_unfinished, to_json, write_json
from fast.heads import adapters, fold_head, places_of, task_head, unwrap
from fast.heads.find import is_plain
from fast.heads.forward import LEAST_EVAL_BATCH
from fast.merge.join import join
from fast.merge.joined import Joined
from fast.models.preparation import Preparation
from fast.models.saved import (
    DATA_FILE,
    HISTORY_FILE,
    JOIN_FILE,
    MODEL_FILE,
    OPTIONS_FILE,
    RESULT_FILE,
    is_going_on,
    save_networks,
    write_manifest,
)
from fast.models.saved.description import (
    announced_classes,
    describe_network,
    save_library_config,
    source_classes,
)

log = logging.getLogger("fast")


class Record(TypedDict, total=False):
    """What was measured at one evaluation, a plain dict. What was not measured is None.

    Attributes:
        step: optimizer steps so far.
        loss: mean over the steps since the last record, in nats: the target's, with the penalties
            of distillation and rehearsal, without the loss of replayed inputs.
        target_accuracy, target_loss: on `val`.
        source_accuracy, source_loss: on `source`, by the source head.
        forgetting: source accuracy lost so far.
        forecast: rise of the source loss in nats, or accuracy lost under a budget in points; it
            needs a card or source inputs, and right after a check it is the measurement.
        drift: `||w - w0||`.
        grad_norm, lr: of the last step.
        seconds: since the run began.
        stage, place: of `fast.rewind` alone, see `Rewound`.
    """

    step: int
    loss: float | None
    target_accuracy: float | None
    target_loss: float | None
    source_accuracy: float | None
    source_loss: float | None
    forgetting: float | None
    forecast: float | None
    drift: float
    grad_norm: float | None
    lr: float
    seconds: float | None
    stage: str
    place: float


def unmeasured(
    *, step: int, drift: float, forecast: float | None, grad_norm: float | None, lr: float
) -> Record:
    """A record of what a step shows by itself; nothing is measured on data."""
    return {
        "step": step,
        "loss": None,
        "target_accuracy": None,
        "target_loss": None,
        "source_accuracy": None,
        "source_loss": None,
        "forgetting": None,
        "forecast": forecast,
        "drift": drift,
        "grad_norm": grad_norm,
        "lr": lr,
        "seconds": None,
    }


@dataclass(kw_only=True, repr=False)
class Result:
    """A fine-tuned model and how it got there.

    Attributes:
        model: the adapted network, in evaluation mode, with the source head inside
            (`fast.fold_head` makes it plain).
        history: one record per evaluation.
        config: the options of the run, as they were given.
        plan: the settings that the options resolved to.
        source_accuracy_before: source accuracy of the pretrained network.
        classes: names of the target's classes; None where they have none, or where the network has
            them in its configuration.
        run: id of the run, where it had a folder.
        data: what the command line read: classes, samples of each, preprocessing.
        network: what --model named, by which the network is built again.
        preparation: what pictures and texts go through on their way to the network.
        inputs: shapes and types of the network's inputs (`fast.models.signature`).
        by_class: for each class, how many samples of `val` the network in `model` answers right,
            and how many there are.
    """

    model: nn.Module
    history: list[Record]
    config: AdaptConfig
    source_accuracy_before: float | None = None
    classes: list[str] | None = field(default=None)
    chosen: Record | None = None
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
    def final(self) -> Record:
        """The record of the weights in `model`: the last one; with early stopping the best one; or
        the first, if training made the head start worse on `val`."""
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
        """The matplotlib Figure of the run: target and source accuracy, and the forecast, by step.

        In a notebook it shows after `%matplotlib inline`; `figure.savefig` writes it.

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

    def predict(self, inputs: Any, **options: Any) -> Predictions:
        """Classes of inputs with their probabilities: see `fast.deploy.Predictor.predict`."""
        return self._predictor().predict(inputs, **options)

    def evaluate(self, data: Any, **options: Any) -> Evaluation:
        """How good the answers to labelled data are: see `fast.deploy.Predictor.evaluate`."""
        return self._predictor().evaluate(data, **options)

    def export(self, folder: str | Path, format: ExportFormat, **options: Any) -> Path:
        """Write the network for use without this library: see `fast.deploy.Predictor.export`."""
        return self._predictor().export(folder, format, **options)

    def _predictor(self) -> Predictor:
        """What `fast.load` would return had the result been saved; it shares `model`."""
        model, config = unwrap(self.model), self.config
        return Predictor(
            model=model,
            classes=self._class_names(),
            source_classes=source_classes(model, self.network),
            preparation=self.preparation,
            inputs=self.inputs,
            name=self.network,
            precision=getattr(config, "precision", "auto"),
            mirrored=bool(getattr(config, "tta", False)),
            batch_size=max(LEAST_EVAL_BATCH, config.batch_size),
            keeps_head=config.keeps_head,
            lacks="" if task_head(model) is not None else "the head of the source was folded away",
            facts=self._accuracies() | {"method": config.method},
            notes=self.notes,
        )

    def _class_names(self) -> list[str] | None:
        """`classes`, or else the names that the network itself has for them."""
        return announced_classes(self.model) if self.classes is None else self.classes

    def _accuracies(self) -> dict[str, float | None]:
        return {
            "target_accuracy": self.target_accuracy,
            "source_accuracy": self.source_accuracy,
            "source_accuracy_before": self.source_accuracy_before,
        }

    def _facts(self) -> dict[str, str]:
        """What the representations show."""
        facts = {"model": type(self.model).__name__, "method": self.config.method}
        if self.plan is not None:
            facts["tasks"] = self.plan.tasks
        facts["step"] = str(self.final["step"])
        shown = {name: f"{x:.4f}" for name, x in self._accuracies().items() if x is not None}
        return facts | shown

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
        """How `model.safetensors` differs from the plain architecture with as many classes."""
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
        if not is_plain(head.source):
            plain, own = type(head.linear).__name__, type(head.source).__name__
            notes.append(
                f"{name} is a plain {plain}, and the network's own head is not ({own} with weights "
                "or a forward of its own): put a plain one there before loading"
            )
        if head.auxiliary:
            notes.append(
                f"{', '.join(head.auxiliary)}: auxiliary heads keep the source's classes; give "
                "them as many before loading"
            )
        if self.plan is not None and self.plan.adapter_rank:
            notes.append(
                f"{self.plan.functions}: {MODEL_FILE} answers the target alone; the source's are "
                "in other files of the run"
            )
        return notes

    def merge_adapters(self) -> nn.Module:
        """Make `model` a plain network for the target alone, in place: see `fast.fold_head`.

        Each adapter is added to the weight of its layer, so that a pass costs what it cost before.
        The source task is then forgotten, and the log says so.

        Returns:
            `model`.

        Raises:
            ValueError: there are no adapters.
        """
        if not adapters(self.model):
            raise ValueError("the model has no adapters: method='adapter' makes them")
        log.info("adapters are merged into the weights: the network answers the target task alone")
        return fold_head(self.model)

    def join(self, **how: Any) -> Joined:
        """One network for the source's classes and the target's: see `fast.join`."""
        return join(self, **how)

    def save(self, folder: str | Path) -> Path:
        """Write the model and how it was made, each file whole or not at all; `fast.load` reads it.

        * `model.safetensors`: the folded network, adapters merged. It loads into the plain
          architecture with as many classes and a bias in its head (the mean of the features becomes
          part of the bias).
        * `source_head.safetensors`: weight and bias of the head that was replaced;
          `source_norms.safetensors`: the source's batch norms, if each task has its own.
        * `adapters.safetensors`, if there are adapters: for each layer `NAME` with an adapter, the
          source's weight `NAME.weight` and the factors `NAME.A` and `NAME.B`; for a weight `NAME`
          of attention, `NAME`, `NAME.A` and `NAME.B` (`fast.heads.attach_adapters`).
        * `fast.json`, `result.json`, `history.jsonl`: options; accuracies, plan and notes; history.
        * `preprocessing.json`: what pictures and texts go through, with the tokenizer beside it.
        * `config.json`: the architecture of a transformers network.
        * `data.json`: what was read; `manifest.json`: hashes of all files.

        Returns:
            the folder.

        Raises:
            ValueError: a run is going on in the folder.
        """
        folder = Path(folder)
        if is_going_on(folder):
            raise ValueError(f"{folder}: a run is going on there; name another folder")
        clear_unfinished(folder)
        model = unwrap(self.model)
        save_networks(model, folder)
        classes = self._class_names()
        save_library_config(model, folder, classes)
        write_json(folder / OPTIONS_FILE, dataclasses.asdict(self.config))
        self.preparation.save(folder)
        write_json(
            folder / RESULT_FILE,
            {
                **self._accuracies(),
                "classes": classes,
                "final": self.final,
                "plan": dataclasses.asdict(self.plan) if self.plan else None,
                "notes": self.notes,
                "network": describe_network(model, self.network),
                "inputs": self.inputs,
            },
        )
        (folder / JOIN_FILE).unlink(missing_ok=True)  # of a joined network that was saved here
        if self.data is None:
            (folder / DATA_FILE).unlink(missing_ok=True)
        else:
            write_json(folder / DATA_FILE, self.data)
        with atomic_file(folder / HISTORY_FILE) as path:
            path.write_text("".join(to_json(r) + "\n" for r in self.history))
        write_manifest(folder, self.run, self.config.computed())
        return folder
