"""The data sets that are named on the command line, as they are stored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fast.cli.options import flag
from fast.cli.spec.task import TaskSpec
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import is_image_split
from fast.data.labels import class_places, count_classes, places_by_order
from fast.data.source_inputs import LIMIT, SourceInputs
from fast.data.sources import DataWarning, EncodedAudio, NamedData, Split, has_columns, load_data
from fast.data.sources.files import repeated_samples
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
            again = repeated_samples(sets[role], folds=bool(spec.folds))
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
        samples = sum(len(split) for split in (data.train, data.val) if split is not None)
        names = [str(i) for i in range(count_classes(top, samples, data.name))]
    train, val = (
        None if split is None else replace(split, labels=number[split.labels])
        for split in (data.train, data.val)
    )
    return replace(data, train=train, val=val, classes=tuple(names), sorted_names=False)


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


def check_numbers(
    option: str, data: NamedData, classes: int, names: Sequence[str] | None, more: bool = False
) -> list[str]:
    """Refuse labels that cannot be those of the network's own head, before anything is run.

    Args:
        option: the option with its value, for the message.
        data: what `numbered_as_in_head` returned.
        classes: the number of classes of the head.
        names: their names; None where they are not known.
        more: allow larger labels, which belong to a skill that is in the features.

    Returns:
        a note, if classes are matched by their order alone.

    Raises:
        ValueError: the labels cannot be the network's own.
    """
    if unclear := unclear_names(data, classes, names, more):
        raise ValueError(
            f"{option}: {unclear}. Give them the network's names, or the classes' numbers, "
            f"0..{classes - 1}"
        )
    top = largest_label(data)
    if top >= classes and not more:
        raise ValueError(
            f"{option}: labels must be 0..{classes - 1}, as the network's own head has {classes} "
            f"classes; got {top}. Is it the data that the network was trained for?"
        )
    by_order = data.sorted_names and len(data.classes) == classes
    return [places_by_order(option, data.classes, names)] if by_order else []


def largest_label(data: NamedData) -> int:
    """The largest label of both splits."""
    return max(int(split.labels.max()) for split in (data.train, data.val) if split is not None)


def unclear_names(
    data: NamedData, classes: int, names: Sequence[str] | None, more: bool = False
) -> str:
    """Why names of classes cannot be matched with the head's classes; "" where they can.

    Args:
        classes, names, more: see `check_numbers`.
    """
    count = len(data.classes)
    if not data.sorted_names or count == classes or (more and count > classes):
        return ""
    own = f" ({some(names)})" if names else ""
    return (
        f"{count} classes with names ({some(data.classes)}), and the network's own head has "
        f"{classes} classes{own}: nothing says which is which"
    )


def same_samples(source: NamedData, source_inputs: NamedData) -> bool:
    """Whether both come from the one split of one file or folder."""
    a, b = (Path(data.name).expanduser().resolve() for data in (source, source_inputs))
    return a == b and (source.train is None or source.val is None)
