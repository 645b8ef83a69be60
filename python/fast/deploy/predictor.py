"""A network that predicts, with all that is known about its inputs and classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fast.data.dataset import as_data
from fast.data.labels import check_labels, check_several
from fast.data.sources import FileReport, Split
from fast.data.trees import leaves, mapped, move, plain
from fast.deploy.evaluation import Evaluation
from fast.deploy.export.formats import FORMATS, export
from fast.deploy.export.subject import Subject
from fast.deploy.labelled import labelled_data
from fast.deploy.predictions import Predictions
from fast.deploy.raw import input_names, raw_inputs
from fast.deploy.words import ExportFormat, Task
from fast.errors import printable
from fast.heads import (
    evaluating,
    fold_head,
    forward_logits,
    places_of,
    source_task,
    task_head,
)
from fast.heads.forward import LEAST_EVAL_BATCH, answers, check_mirrored, input_errors
from fast.merge.joined import Joined
from fast.models.device import autocast_dtype
from fast.models.preparation import Preparation
from fast.models.signature import example

# One for each network. A predictor that held it could not be copied.
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@dataclass(kw_only=True, repr=False)
class Predictor:
    """What `fast.load` returns.

    Attributes:
        model: the network. It answers the target task, and inside `fast.source_task` the source's;
            a joined network answers both in one softmax.
        classes: names of the target's classes, for a joined network of the classes of both tasks;
            None where they have no names.
        source_classes: names of the source's classes, where the network or its library has them.
        preparation: what pictures, sounds and texts go through on their way to the network.
        inputs: shapes and types of the network's inputs (`fast.models.signature`).
        name: the name that the network was loaded by, as --model takes it.
        precision: precision of the forward pass, as in the run.
        mirrored: whether `evaluate` averages the answers to an image and its mirror image, as the
            run did for the target (`tta`).
        batch_size: samples of a batch, as in the evaluations of the run.
        keeps_head: whether the run went on with the network's own head, so that there is one task.
        lacks: what is missing to answer the source task; empty where nothing is.
        facts: accuracies and the method of the run.
        notes: how the weights differ from the plain architecture (`Result.notes`).
    """

    model: nn.Module
    classes: list[str] | None = None
    source_classes: list[str] | None = None
    preparation: Preparation = field(default_factory=Preparation)
    inputs: Any = None
    name: str | None = None
    precision: str = "auto"
    mirrored: bool = False
    batch_size: int = LEAST_EVAL_BATCH
    keeps_head: bool = False
    lacks: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        network = self.name or type(self.model).__name__
        count = "" if self.classes is None else f"{len(self.classes)} classes, "
        return f"Predictor({network}, {count}takes {self.preparation.kind})"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def predict(
        self,
        inputs: Any,
        *,
        task: Task | None = None,
        batch_size: int | None = None,
        column: str | None = None,
        skip_broken: bool = False,
    ) -> Predictions:
        """Predict the class of each input, with the probabilities of all classes.

        Args:
            inputs: a network of pictures takes paths of files, folders and `.csv` tables, pictures
                of Pillow, or uint8 arrays `[N, H, W, C]`; all of them go through the pipeline of
                the run. A network of texts takes a text, a list of texts, or a `pathlib.Path` to a
                table, to a file with one text a line, or to a folder of files of one text each.
                Every network takes tensors in the form that its forward pass takes.
            task: "source" asks for the classes of the task before. A joined network is asked for
                "both" by default; "source" and "target" keep to the classes of one task.
            batch_size: samples of a batch (default: as in the run's evaluations).
            column: the column of a table that holds the inputs (default: by its usual names).
            skip_broken: leave out pictures that cannot be read; they are in `unreadable`.

        Raises:
            FileNotFoundError: a path leads nowhere.
            ValueError: the network takes other inputs, or they cannot be read; the folder lacks
                what the source task needs; or a network that is not joined is asked for both.
        """
        task = self.task_of(task)
        split, names = raw_inputs(inputs, self.preparation, column)
        report = FileReport(skips=skip_broken)
        logits, good = [], []
        with self.answering(task):
            for batch, rows in self._batches(split, batch_size or self.batch_size, report):
                if len(rows) and not leaves(split.inputs):
                    self._check_size(batch, names[rows[0]])
                if report.broken and not skip_broken:
                    continue  # the rest is read, so that the message names all
                logits.append(self.logits(batch))
                good += rows.tolist()
        report.check(any_read=bool(good))
        scores = self._of_task(torch.cat(logits), task)
        return Predictions(
            names=[names[i] for i in good],
            classes=self.class_names(task, scores.shape[1]),
            logits=scores,
            unreadable=dict(report.broken),
        )

    def evaluate(
        self,
        data: Any,
        *,
        task: Task | None = None,
        batch_size: int | None = None,
        skip_broken: bool = False,
        **columns: str | None,
    ) -> Evaluation:
        """Compare the answers to labelled data with the labels.

        Args:
            data: a name, as --data takes it; or `(inputs, labels)`, a Dataset or a DataLoader, with
                inputs in the form that the network takes. Where a named set has splits, the
                held-out one is used.
            task: the task that the labels are of; "source" is the task before. A joined network
                takes labels of "both" by default, numbered in the order of its classes.
            batch_size: samples of a batch (default: as in the run's evaluations).
            skip_broken: leave out files that cannot be read.
            columns: `input_column` and `label_column` of a Hugging Face data set.

        Raises:
            FileNotFoundError: there is no such data set.
            ValueError: the data cannot be read, or they have classes that the task has not.
        """
        task = self.task_of(task)
        classes = self._classes(task)
        named = labelled_data(
            data, self.preparation, classes, task, skip_broken=skip_broken, **columns
        )
        scores, labels = [], []
        with self.answering(task):
            size, mirrored = batch_size or self.batch_size, self.mirrored and task == "target"
            for inputs, y in named.batches(size):
                scores.append(self.logits(inputs, named.name, mirrored))
                labels.append(y)
        logits, raw = self._of_task(torch.cat(scores), task), named.raw
        return Evaluation(
            task=task,
            classes=self.class_names(task, logits.shape[1]),
            labels=check_labels(torch.cat(labels), logits.shape[1], named.name),
            logits=logits,
            names=None if raw is None else input_names(raw),
            raw=raw,
            unreadable=dict(named.report.broken),
        )

    def export(self, folder: str | Path, format: ExportFormat, *, sample: Any = None) -> Path:
        """Write the target's network, or a joined one, for use without this library.

        Args:
            folder: a folder that is new or empty.
            format: `onnx`, `torch.export`, `safetensors`, `hf` or `timm`; see docs/production.md.
            sample: a batch of at least two inputs in the form that the network takes; it is needed
                where their shapes are not known.

        Returns:
            the folder. Where the format can be run here, its answers were compared with the
            network's.

        Raises:
            ValueError: the folder is not empty, the format is unknown, or the network cannot be
                written in it; the message says why.
            ImportError: the format needs a library that is not installed.
        """
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
        return export(self._subject(sample), Path(folder).expanduser(), format)

    def _subject(self, sample: Any) -> Subject:
        """The plain network on the CPU, with what an export says of it."""
        head = task_head(self.model)
        name = None if head is None else places_of(self.model, head)[0][2]
        network = fold_head(copy.deepcopy(self.model)).cpu().float().eval()
        if isinstance(network, Joined):
            name, network = network.head, network.plain
        what = "sample" if sample is not None else "sample, which is made up if you pass none"
        if sample is None:
            tokenizer = self.preparation.tokenizer
            texts = None if tokenizer is None else self.preparation.tokens(["a", "a b c"])
            sample = texts if texts is not None else example(self.inputs)
        sample = mapped(plain(sample), lambda x: _floats(x.detach().cpu()))
        with evaluating(network), input_errors(what, sample, network):
            count = forward_logits(network, sample).shape[1]
        return Subject(
            network=network,
            classes=self.class_names(self.task_of(None), count),
            preparation=self.preparation,
            sample=sample,
            head=name,
            spec=self.name,
            facts=self.facts,
            odds=self.notes,
        )

    @property
    def is_joined(self) -> bool:
        """Whether the network answers the classes of both tasks in one softmax."""
        return isinstance(self.model, Joined)

    def task_of(self, task: Task | None) -> Task:
        """The task to answer: by default both for a joined network, and the target for any other.

        Raises:
            ValueError: there is no such task, or only a joined network has it.
        """
        if task is None:
            return "both" if self.is_joined else "target"
        if task not in get_args(Task):
            raise ValueError(f"task must be target, source or both; got {task!r}")
        if task == "both" and self.keeps_head:
            raise ValueError(
                "task both: the run kept the network's head, so that there is one task; leave the "
                "task out"
            )
        if task == "both" and not self.is_joined:
            raise ValueError(
                "task both: each task of this run has a head and a softmax of its own. Make one "
                "network for the classes of both (fast join RUN --source-inputs OLD --output "
                "JOINED, in Python fast.join), and ask that one"
            )
        return task

    @contextmanager
    def answering(self, task: Task) -> Iterator[None]:
        """Let the network answer a task; a joined network always answers both.

        Threads take turns, because the network is switched for all of them.
        """
        if self.keeps_head or self.is_joined:
            yield
            return
        switch: AbstractContextManager[Any] = nullcontext()
        if task == "source":
            if self.lacks or task_head(self.model) is None:
                raise ValueError(f"the source task cannot be answered: {self.lacks}")
            switch = source_task(self.model)
        with _locks.setdefault(self.model, RLock()), switch:
            yield

    def logits(self, inputs: Any, name: str = "inputs", mirrored: bool = False) -> Tensor:
        """Logits `[B, C]` for a batch of inputs, in float32 on the CPU.

        Args:
            name: name of the data, for messages.
            mirrored: average the logits for an image and its mirror image.

        Raises:
            ValueError: the network does not take the inputs, or there is nothing to mirror.
            FloatingPointError: logits are NaN or infinite.
        """
        if mirrored:
            check_mirrored(inputs, name)
        dtype = autocast_dtype(self.precision, self.device)
        with (
            input_errors(name, inputs, self.model),
            evaluating(self.model),
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
        ):
            logits = answers(self.model, move(inputs, self.device), mirrored).cpu()
        wrong = int((~logits.logsumexp(1).isfinite()).sum())
        if wrong:
            raise FloatingPointError(
                f"{name}: the network's answers to {wrong} of {len(logits)} samples are NaN or "
                "infinite: look at the inputs"
            )
        return logits

    def class_names(self, task: Task, count: int) -> list[str]:
        """The names of `count` classes, which are numbers where the classes have none."""
        names = self._classes(task)
        numbers = [str(i) for i in range(count)]
        return numbers if names is None or len(names) != count else names

    def _classes(self, task: Task) -> list[str] | None:
        if isinstance(self.model, Joined) and task != "both":
            return [self.model.classes[i] for i in self.model.classes_of(task)]
        return self.source_classes if task == "source" and not self.keeps_head else self.classes

    def _of_task(self, logits: Tensor, task: Task) -> Tensor:
        """The logits of the classes that a task has."""
        check_several(logits.shape[1], f"task {task}")
        if isinstance(self.model, Joined) and task != "both":
            return logits[:, self.model.classes_of(task)]
        return logits

    def _check_size(self, batch: Any, name: str) -> None:
        """Refuse pictures of another size than those of a run that kept their size."""
        form = self.preparation.images
        if form is None or form.size is not None or not isinstance(self.inputs, dict):
            return
        there, wanted = list(batch.shape[1:]), self.inputs.get("shape")
        if wanted is not None and there != wanted:
            raise ValueError(
                f"{printable(name)}: [C, H, W] is {there}, and the run had pictures of "
                f"{wanted}, as they were: resize it as these were made"
            )

    def _batches(
        self, split: Split, batch_size: int, report: FileReport
    ) -> Iterator[tuple[Any, Tensor]]:
        """Batches in the form that the network takes, with the rows that they come from."""
        if leaves(split.inputs):  # tensors
            wide = next(self.model.parameters()).dtype == torch.float64
            inputs = split.inputs if wide else mapped(split.inputs, _floats)
            return as_data((inputs, split.labels), "inputs").eval_batches(batch_size)
        return self.preparation.batches(split, batch_size, report)


def _floats(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x
