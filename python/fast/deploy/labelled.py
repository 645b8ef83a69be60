"""Labelled data to evaluate on, with the labels of the run's classes."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fast.data.dataset import Data, as_data
from fast.data.labels import check_labels
from fast.data.sources import DataWarning, NamedData, load_data
from fast.deploy.raw import input_names
from fast.errors import printable, some
from fast.models.preparation import Preparation


@dataclass(kw_only=True)
class LabelledData:
    """Data to evaluate on.

    Attributes:
        names: of the samples; None where they have none.
        raw: the samples as stored, where they were read by name.
    """

    data: Data
    names: list[str] | None = None
    raw: Any = None

    def checked(self, labels: Tensor, classes: int) -> Tensor:
        """Labels `[N]` within the classes."""
        return check_labels(labels, classes, self.data.name)


def labelled_data(
    data: Any,
    preparation: Preparation,
    classes: list[str] | None,
    task: str,
    **columns: str | None,
) -> LabelledData:
    """See `Predictor.evaluate`."""
    if isinstance(data, (str, os.PathLike)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            data = load_data(os.fspath(data), **columns, numeric_labels=task == "source")
    if isinstance(data, NamedData):
        split = data.for_evaluation()
        split = replace(split, labels=_numbered(split.labels, data, classes, task))
        prepared = preparation(split)
        return LabelledData(
            data=as_data(prepared, data.name), names=input_names(split.inputs), raw=split.inputs
        )
    return LabelledData(data=as_data(data, "data"))


def _numbered(
    labels: np.ndarray, data: NamedData, classes: list[str] | None, task: str
) -> np.ndarray:
    """Labels as the run numbers its classes, by their names.

    Names that are numbers, as files without names of classes have them, are labels of the run.

    Raises:
        ValueError: a class of the data is none of the run's, or a number that may be of either
            task.
    """
    if classes is None or list(data.classes[: len(classes)]) == classes:
        return labels
    number = {name: i for i, name in enumerate(classes)}
    present = [data.classes[i] for i in np.unique(labels)]
    strange = [name for name in present if name not in number]
    if all(name.isdecimal() for name in data.classes):
        if task != "both":
            return labels
        raise ValueError(
            f"{data.name}: its classes are numbers, which do not say whose they are: name the "
            "task, source or target (task=, --task)"
        )
    if strange and task == "source" and len(data.classes) == len(classes):
        return labels  # the library calls the classes otherwise; their order is the network's
    if strange:
        whose = "both tasks" if task == "both" else f"the {task}'s"
        raise ValueError(
            f"{data.name}: classes that are none of {whose}: {some(strange)}; there are "
            f"{some([printable(name) for name in classes], 12)}"
        )
    order = np.array([number.get(name, -1) for name in data.classes])
    return order[labels]
