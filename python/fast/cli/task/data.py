"""The data sets that are named on the command line, as they are stored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fast.cli.options import flag
from fast.cli.spec.task import TaskSpec
from fast.data.labels import class_places, count_classes
from fast.data.source_inputs import LIMIT, SourceInputs
from fast.data.sources import DataWarning, NamedData, Split, has_columns, load_data
from fast.data.sources.files import repeated_samples, samples_hash

ROLES = ("data", "source", "source_inputs")
PARTS = ("train", "val")


def read_data(spec: TaskSpec, *, hold_out: bool = True) -> tuple[dict[str, NamedData], list[str]]:
    """The data sets, by the options that name them; and notes on whatever is left out of them.

    Args:
        hold_out: hold out a share of the target's training samples if there are no others to
            measure on.

    Raises:
        ValueError: a data set is unusable, or an option does not fit it.
        FileNotFoundError: a data set is not there.
    """
    names = {role: getattr(spec, role) for role in ROLES if getattr(spec, role)}
    columns = {"input_column": spec.input_column, "label_column": spec.label_column}
    for option, column in columns.items():
        if column is not None and not any(map(has_columns, names.values())):
            name = next(iter(names.values()))
            raise ValueError(
                f"{flag(option)} is for tables and Hugging Face data sets; {name} is none: drop it"
            )
    sets, notes = {}, []
    for role, name in names.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            sets[role] = load_data(
                name,
                **columns,
                numeric_labels=role != "data",
                unlabelled=role == "source_inputs",
            )
        notes += [f"{flag(role)} {name}: {note}" for note in sets[role].notes]
        if role == "data" and hold_out:
            whole = replace(sets[role], samples_hash=samples_hash(sets[role]))
            sets[role] = _hold_out(spec, whole)
            again = repeated_samples(sets[role], folds=bool(spec.folds))
            notes += [f"{flag(role)} {name}: {note}" for note in again]
    return sets, notes


def _hold_out(spec: TaskSpec, data: NamedData) -> NamedData:
    """The data, with a share of the training samples held out if they have no held-out ones."""
    if data.val is not None and spec.val_fraction != TaskSpec.val_fraction:
        raise ValueError(
            f"--val-fraction: --data {spec.data} has held-out samples of its own "
            f"({data.held_out}); drop the option"
        )
    if data.val is not None and spec.folds:
        raise ValueError(
            f"--folds: --data {spec.data} has held-out samples of its own ({data.held_out}); name "
            "its training split alone, or drop the option"
        )
    return data if spec.folds else data.with_val(spec.val_fraction)


def numbered_as_in_head(data: NamedData, names: Sequence[str] | None) -> NamedData:
    """The data with their classes numbered as in the network's own head; as they are, where some
    cannot be found there: see `check_numbers`.

    Args:
        names: names of the network's classes; None where they are not known.
    """
    places = class_places(data.classes, names or ())
    if not data.has_labels or None in places:
        return data
    number = np.array(places, dtype=np.int64)
    top = int(number.max())
    if names is None or top >= len(names):
        samples = sum(map(len, data.splits.values()))
        names = [str(i) for i in range(count_classes(top, samples, data.name))]
    splits = {
        part: replace(split, labels=number[split.labels]) for part, split in data.splits.items()
    }
    return replace(data, splits=splits, classes=tuple(names), sorted_names=False)


def splits_of(sets: dict[str, NamedData]) -> dict[str, Split]:
    """The splits that a run uses: train, val, source and source_inputs."""
    splits = dict(sets["data"].splits)
    if "source" in sets:
        splits["source"] = sets["source"].for_evaluation()
    if "source_inputs" in sets:
        splits["source_inputs"] = drawn_inputs(sets["source_inputs"])
    return splits


def drawn_inputs(data: NamedData) -> Split:
    """The source inputs that are used, drawn at random because folders are sorted by class."""
    split = data.for_training()
    return split.subset(np.random.default_rng(0).permutation(len(split))[:LIMIT])


def source_samples(data: NamedData, prepared: Any) -> Any:
    """Source inputs as `fast.finetune` takes them, without labels if the data have none."""
    if data.has_labels:
        return prepared
    return SourceInputs.parse(prepared, LIMIT, "source_inputs").without_labels()


def same_samples(source: NamedData, source_inputs: NamedData) -> bool:
    """Whether both come from the one split of one file or folder."""
    a, b = (Path(data.name).expanduser().resolve() for data in (source, source_inputs))
    return a == b and len(source.splits) == 1
