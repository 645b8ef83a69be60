"""Refuse data that do not fit each other, the options or the network, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fast.cli.options import flag
from fast.cli.spec.task import TaskSpec
from fast.cli.task.data import PARTS, ROLES
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import is_image_split
from fast.data.labels import places_by_order
from fast.data.sources import EncodedAudio, NamedData, Split
from fast.data.sources.table import SUFFIXES as TABLES
from fast.errors import printable, some

IMAGES, FLOATS = "images", "an array of floats"


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
    return max(int(split.labels.max()) for split in data.splits.values())


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
