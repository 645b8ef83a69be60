"""Labelled data to evaluate on; their labels are numbered as the run numbers its classes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.dataset import Data, as_data
from fast.data.labels import class_places, places_by_order
from fast.data.sources import DataWarning, FileReport, NamedData, Split, load_data
from fast.errors import printable, some, warn
from fast.models.preparation import Preparation


@dataclass(kw_only=True)
class LabelledData:
    """Data to evaluate on: batches as they are given, or samples that are read by name.

    Attributes:
        name: name of the data, for messages.
        preparation: what the samples of `split` go through.
        data: batches that are ready for the network; None where there is a `split`.
        split: samples that still have to be prepared.
        rows: the rows of the split that `batches` could read.
        report: what was found in the files of the split.
    """

    name: str
    preparation: Preparation
    data: Data | None = None
    split: Split | None = None
    rows: list[int] = field(default_factory=list)
    report: FileReport = field(default_factory=FileReport)

    def batches(self, batch_size: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs in the form that the network takes, and their labels.

        Raises:
            ValueError: files cannot be read.
        """
        if self.split is None:
            assert self.data is not None
            yield from self.data.eval_batches(batch_size)
            return
        labels = torch.from_numpy(self.split.labels)
        numbered = replace(self.split, labels=np.arange(len(labels)))
        for inputs, rows in self.preparation.batches(numbered, batch_size, self.report):
            self.rows += rows.tolist()
            yield inputs, labels[rows]
        self.report.check(any_read=bool(self.rows))

    @property
    def raw(self) -> Any:
        """The samples that could be read, as they are stored; None if none were read by name."""
        return None if self.split is None else self.split.subset(np.array(self.rows)).inputs


def labelled_data(
    data: Any,
    preparation: Preparation,
    classes: list[str] | None,
    task: str,
    *,
    skip_broken: bool,
    **columns: Any,
) -> LabelledData:
    """What `Predictor.evaluate` takes, as data to evaluate on.

    Args:
        classes: names of the classes of the task, or None.
        skip_broken, columns: see `Predictor.evaluate`.
    """
    if isinstance(data, (str, os.PathLike)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            data = load_data(os.fspath(data), **columns, numeric_labels=task == "source")
    if isinstance(data, NamedData):
        split = numbered(data.for_evaluation(), data, classes, task)
        report = FileReport(skips=skip_broken)
        return LabelledData(name=data.name, preparation=preparation, split=split, report=report)
    return LabelledData(name="data", preparation=preparation, data=as_data(data, "data"))


def numbered(split: Split, data: NamedData, classes: list[str] | None, task: str) -> Split:
    """A split with its labels numbered as the run numbers its classes, by the names of classes.

    Files without names of classes have numbers in their place, which are taken for labels of the
    run.

    Args:
        split: of `data`.
        classes: names of the classes of the run, or None.
        task: the task that these are classes of.

    Raises:
        ValueError: the run has no class of this name, or a number may be of either task.
    """
    if task == "both" and all(name.isdecimal() for name in data.classes):
        raise ValueError(
            f"{data.name}: its classes are numbers, which do not say whose they are: name the "
            "task, source or target (task=)"
        )
    labels = split.labels
    places = class_places(data.classes, classes or ())
    strange = [data.classes[i] for i in np.unique(labels) if places[i] is None]
    if strange and classes is None and not data.sorted_names:
        return split
    if strange and (classes is None or (task == "source" and len(data.classes) == len(classes))):
        warn(places_by_order(data.name, data.classes, classes), DataWarning)
        return split
    if strange:
        whose = "both tasks" if task == "both" else f"the {task}'s"
        raise ValueError(
            f"{data.name}: classes that are none of {whose}: {some(strange)}; the run has "
            f"{some([printable(name) for name in classes or ()], 12)}"
        )
    by_place = np.array([-1 if place is None else place for place in places])
    return replace(split, labels=by_place[labels])
