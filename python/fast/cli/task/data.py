"""The data sets that are named on the command line, as they are stored."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fast.cli.options import flag
from fast.cli.spec.task import TaskSpec
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import is_image_split
from fast.data.source_inputs import LIMIT, SourceInputs
from fast.data.sources import DataWarning, EncodedAudio, NamedData, Split, has_columns, load_data
from fast.data.sources.files import repeated_files
from fast.data.sources.table import SUFFIXES as TABLES
from fast.errors import printable, some

ROLES = ("data", "source", "source_inputs")
IMAGES, FLOATS = "images", "an array of floats"
PARTS = ("train", "val")


def read_data(spec: TaskSpec, notes: list[str], *, hold_out: bool = True) -> dict[str, NamedData]:
    """The data sets, by the options that name them.

    Args:
        notes: gets a line about whatever is left out of a data set.
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
    sets = {}
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
            sets[role] = _hold_out(spec, sets[role])
            again = repeated_files(sets[role], folds=bool(spec.folds))
            notes += [f"{flag(role)} {name}: {note}" for note in again]
    return sets


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


def check_target(spec: TaskSpec, target: NamedData, measured: bool) -> None:
    """Raise ValueError if one cannot train on `target`, or has nothing to measure on."""
    if target.train is None:
        raise ValueError(
            f"--data {spec.data}: has held-out samples ({target.held_out or 'val'}) and no "
            "training split: give one that is called train, or name the folder of the classes "
            "itself"
        )
    if measured and target.val is None:
        raise ValueError("--val-fraction 0: what is compared is measured on held-out samples")
    if len(target.classes) < 2:
        raise ValueError(
            f"--data {spec.data}: has one class only, {printable(target.classes[0])!r}"
            f"{_tables_in(Path(target.name).expanduser())}"
        )


def _tables_in(folder: Path) -> str:
    """A hint that a folder of one class may hold the images that a table beside them lists."""
    files = folder.iterdir() if folder.is_dir() else ()
    tables = sorted(file.name for file in files if file.suffix.lower() in TABLES)
    return f"; it also has {some(tables)}: name the table that says the classes" if tables else ""


def numbered_as_in_head(option: str, data: NamedData, names: list[str] | None) -> NamedData:
    """The data with the classes of a network that keeps its head, in the order of that head.

    Classes are found by their names, or by their numbers where the data have numbers for names.

    Args:
        option: the option with its value, for the message.
        names: names of the network's classes; None, where it has none, leaves the data as they are.

    Raises:
        ValueError: the network has no such class.
    """
    if names is None:
        return data
    numbers = all(name.isdecimal() for name in data.classes)
    own = [str(i) for i in range(len(names))] if numbers else names
    strange = [name for name in data.classes if name not in own]
    if strange:
        raise ValueError(
            f"{option}: --head keep goes on with the network's own classes, {some(names, 12)}, and "
            f"the data have {some(strange)}: give the classes the network's names, or their numbers"
        )
    number = np.array([own.index(name) for name in data.classes])
    train, val = (
        None if split is None else replace(split, labels=number[split.labels])
        for split in (data.train, data.val)
    )
    return replace(data, train=train, val=val, classes=tuple(names))


def splits_of(sets: dict[str, NamedData]) -> dict[str, Split]:
    """The splits that a run uses: train, val, source and source_inputs."""
    target = sets["data"]
    splits = {"train": target.train, "val": target.val}
    if "source" in sets:
        splits["source"] = sets["source"].for_evaluation()
    if "source_inputs" in sets:
        splits["source_inputs"] = drawn_inputs(sets["source_inputs"])
    return {name: split for name, split in splits.items() if split is not None}


def training_split(data: NamedData) -> Split:
    """The training split; the held-out one if there is no other."""
    return data.train if data.train is not None else data.for_evaluation()


def drawn_inputs(data: NamedData) -> Split:
    """The source inputs that are used, drawn at random because folders are sorted by class."""
    split = training_split(data)
    return split.subset(np.random.default_rng(0).permutation(len(split))[:LIMIT])


def source_samples(data: NamedData, prepared: Any) -> Any:
    """Source inputs as `fast.finetune` takes them, without labels if the data have none."""
    if data.has_labels:
        return prepared
    return SourceInputs.parse(prepared, LIMIT, "source_inputs").without_labels()


def check_kinds(spec: TaskSpec, splits: dict[str, Split], images: ImageFormat | None) -> None:
    """Compare the kinds of data with each other and with the options.

    Args:
        images: how images are prepared, where there are some.

    Raises:
        ValueError: training and validation data are of different kinds; or options of images are
            given, and there are none to apply them to.
    """
    kinds = {name: _kind(split) for name, split in splits.items()}
    if "val" in kinds and kinds["val"] != kinds["train"]:
        raise ValueError(
            f"--data {spec.data}: the training split is {kinds['train']}, the validation split "
            f"{kinds['val']}: they would be prepared differently; store both alike"
        )
    if spec.augment != "none" and kinds.get("train", IMAGES) != IMAGES:
        raise ValueError(f"--augment is for images, and --data is {kinds['train']}: drop it")
    options = ("input_size", "resize", "interpolation", "mean", "std")
    image_option = next((name for name in options if getattr(spec, name)), None)
    prepared = {"source_inputs"} if _is_prepared(splits.get("source_inputs"), images) else set()
    other = next((n for n, kind in kinds.items() if kind != IMAGES and n not in prepared), None)
    if image_option and other is not None:
        role = other if other in ROLES else "data"
        arrays = "array" in kinds[other]
        raise ValueError(
            f"{flag(image_option)} is for images, and {flag(role)} is {kinds[other]}"
            + (
                ", handed to the network as it is: store uint8 images, or prepare the data and "
                "drop the option"
                if arrays
                else ": drop the option"
            )
        )


def _is_prepared(split: Split | None, images: ImageFormat | None) -> bool:
    """Whether these are images as floats that are normalised already, as `fast synthetic` writes
    them: only normalised ones have negative values, where the network wants them normalised."""
    if split is None or images is None or _kind(split) != FLOATS:
        return False
    return not images.normalises or bool((split.inputs < 0).any())


def _kind(split: Split) -> str:
    x = split.inputs
    if is_image_split(split):
        return IMAGES
    if isinstance(x, EncodedAudio):
        return "sounds"
    if isinstance(x, list):
        return "texts"
    if isinstance(x, dict):
        return f"arrays {', '.join(sorted(x))}"
    return FLOATS if x.dtype.kind == "f" else "an array of whole numbers"


def check_shapes(spec: TaskSpec, splits: dict[str, Split], prepared: dict[str, Any]) -> None:
    """Raise ValueError if samples of training and validation differ in shape. Whole numbers may be
    tokens, which are padded to the longest text of a split, and are not compared."""
    images = is_image_split(splits["train"])
    if not images:
        inputs = prepared["train"][0]
        if isinstance(inputs, dict) or not inputs.dtype.is_floating_point:
            return
    if "val" not in prepared:
        return
    first = [prepared[name][0] for name in PARTS]
    train, val = (list(x.shape[1:] if isinstance(x, Tensor) else x[0].shape) for x in first)
    if train != val:
        raise ValueError(
            f"--data {spec.data}: training samples are {train}, validation samples {val}; they "
            "must be of one shape" + (" (--input-size)" if images else "")
        )


def check_source_labels(option: str, data: NamedData, classes: int, more: bool = False) -> int:
    """Refuse labels that cannot be the network's own, before anything is run.

    Args:
        option: the option with its value, for the message.
        classes: the number of classes of the network's own head.
        more: allow larger labels, which belong to a skill that is in the features.

    Returns:
        the largest label.

    Raises:
        ValueError: the labels cannot be the network's own.
    """
    head = f"the network's own head has {classes} classes"
    if unclear := unclear_names(data, classes, more):
        raise ValueError(
            f"{option}: {unclear}. Name the folders by the classes' numbers, 0..{classes - 1}"
        )
    top = max(int(s.labels.max()) for s in (data.train, data.val) if s is not None)
    if top >= classes and not more:
        raise ValueError(
            f"{option}: labels must be 0..{classes - 1}, as {head}; got {top}. Is it the data that "
            "the network was trained for?"
        )
    return top


def unclear_names(data: NamedData, classes: int, more: bool = False) -> str:
    """Why the class folders cannot be matched with the head's classes; "" where they can.

    Args:
        classes, more: see `check_source_labels`.
    """
    folders = Path(data.name).expanduser().is_dir() and not has_columns(data.name)
    words = folders and not all(name.isdigit() for name in data.classes)
    count = len(data.classes)
    if not words or count == classes or (more and count > classes):
        return ""
    return (
        f"{count} class folders with names, and the network's own head has {classes} classes: "
        "nothing says which folder is which class"
    )


def same_samples(source: NamedData, source_inputs: NamedData) -> bool:
    """Whether both come from the one split of one file or folder."""
    a, b = (Path(data.name).expanduser().resolve() for data in (source, source_inputs))
    return a == b and (source.train is None or source.val is None)
