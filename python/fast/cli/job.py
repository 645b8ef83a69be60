"""From the options of model and data to what `fast.finetune` takes."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.cli.options import VAL_FRACTION
from fast.cli.prepare import (
    broken_images,
    given_form,
    image_format,
    labels_of,
    prepare,
    random_flip,
)
from fast.cli.report.data_summary import gaps, image_facts, lines
from fast.data.images.pixels import ImageReport, is_image_split, merged
from fast.data.source_inputs import LIMIT
from fast.data.sources import DataWarning, NamedData, Split, has_columns, load_data
from fast.errors import first_line, printable
from fast.models.load import LoadedModel, load_model

IMAGES = "images"
PARTS = ("train", "val")


@dataclass
class Job:
    """One network and its data, prepared.

    train, val, source, source_inputs: `(x, y)` tensors or Datasets; val is None where all samples
        are trained on.
    description: classes, samples of each, preprocessing, as plain values.
    """

    loaded: LoadedModel
    train: Any
    val: Any
    source: Any | None
    classes: tuple[str, ...]
    name: str
    transform: Any | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    source_inputs: Any | None = None
    card: str | None = None
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        """Keyword arguments of `fast.finetune`."""
        given = {"train": self.train, "val": self.val, "source": self.source}
        more = ("transform", "source_inputs", "card")
        given |= {name: getattr(self, name) for name in more if getattr(self, name) is not None}
        return given | {"num_classes": len(self.classes)}


def load_job(args: argparse.Namespace, measured: bool = True) -> Job:
    """Read model and data, and print what they are; what is wrong with them is raised here, before
    training.

    Args:
        measured: there must be samples held out.
    """
    columns = data_columns(args)
    notes: list[str] = []
    target = held_out(args, read_data("data", args.data, notes, **columns))
    if target.train is None:
        raise ValueError(
            f"--data {args.data}: has held-out samples ({target.held_out or 'val'}) and no "
            "training split: give one that is called train, or name the folder of the classes "
            "itself"
        )
    if measured and target.val is None:
        raise ValueError("--val-fraction 0: what is compared is measured on held-out samples")
    if len(target.classes) < 2:
        raise ValueError(
            f"--data {args.data}: has one class only, {printable(target.classes[0])!r}"
        )
    source = None
    if args.source:
        source = read_data("source", args.source, notes, **columns, numeric_labels=True)

    loaded = load_model(args.model, args.weights, allow_missing=args.allow_missing)
    splits = {"train": target.train}
    if target.val is not None:
        splits["val"] = target.val
    if source is not None:
        splits["source"] = source.for_evaluation()
    known = None
    if getattr(args, "source_inputs", None):
        name = args.source_inputs
        known = read_data("source-inputs", name, notes, **columns, numeric_labels=True)
        splits["source_inputs"] = _source_inputs(known)
        if source is not None and _same_samples(source, known):
            notes.append(
                f"--source-inputs {args.source_inputs}: the same samples as --source: what is kept "
                "is measured on what it is kept with, and looks better than it is; name others"
            )
    check_kinds(args, splits)
    form = image_format(args, loaded, splits)
    reports = {name: ImageReport() for name in splits}
    ready = {
        name: prepare(split, loaded, form, args.max_length, reports[name])
        for name, split in splits.items()
    }
    notes += broken_images(args, *reports.values())
    _check_shapes(args, splits, ready)
    classes = try_forward(loaded, ready["train"])
    if source is not None:
        check_source(f"--source {args.source}", source, classes)
    # Where the skill is in the features, labels need not be the head's.
    if known is not None and getattr(args, "source_skill", None) != "features":
        top = check_source(f"--source-inputs {args.source_inputs}", known, classes, more=True)
        if top >= classes and getattr(args, "source_skill", "auto") == "auto":
            notes.append(
                f"--source-inputs {args.source_inputs}: label {top}, and the network's own head "
                f"has {classes} classes: what is forgotten is measured by its features, not by its "
                "answers (--source-skill)"
            )
    read = {
        part: Split(inputs=None, labels=labels_of(ready[part])) for part in PARTS if part in ready
    }
    data = replace(target, train=read["train"], val=read.get("val")).description
    images = is_image_split(target.train)
    target_report = merged(reports[part] for part in PARTS if part in reports)
    description: dict[str, Any] = {
        "data": data,
        "images": image_facts(form, loaded.preprocessing, given_form(args), target_report)
        if images
        else None,
    }
    loaded.notes += notes + [f"--data {args.data}: {note}" for note in gaps(data)]
    print(lines(description))
    tell(loaded.notes)
    description["notes"] = loaded.notes
    return Job(
        loaded,
        ready["train"],
        ready.get("val"),
        ready.get("source"),
        target.classes,
        short_name(args),
        random_flip if args.flip else None,
        {name: len(labels_of(part)) for name, part in ready.items()},
        ready.get("source_inputs"),
        getattr(args, "card", None),
        description,
    )


def read_data(option: str, name: str, notes: list[str], **columns: Any) -> NamedData:
    """`load_data`, what it leaves out told in notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        data = load_data(name, **columns)
    notes += [f"--{option} {name}: {note}" for note in data.notes]
    return data


def tell(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def held_out(args: argparse.Namespace, data: NamedData) -> NamedData:
    """With a share of its training samples held out, where it has none of its own.

    Raises:
        ValueError: a share was given, and there are some.
    """
    if data.val is not None and args.val_fraction != VAL_FRACTION:
        raise ValueError(
            f"--val-fraction: --data {args.data} has held-out samples of its own "
            f"({data.held_out}); drop the option"
        )
    return data.with_val(args.val_fraction)


def data_columns(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load_data`.

    Raises:
        ValueError: columns are named, and none of the data sets has any.
    """
    names = [getattr(args, option, None) for option in ("data", "source", "source_inputs")]
    columns = {"input_column": args.input_column, "label_column": args.label_column}
    for option, column in columns.items():
        if column is not None and not any(has_columns(name) for name in names if name):
            flag = option.replace("_", "-")
            given = next(name for name in names if name)
            raise ValueError(f"--{flag} is for Hugging Face data sets; {given} is none: drop it")
    return columns


def check_source(option: str, data: NamedData, classes: int, more: bool = False) -> int:
    """Refuse labels that cannot be the network's own, before anything is run.

    Args:
        option: with its value, for the message.
        classes: that the network's head answers.
        more: labels beyond these are of a skill that is in the features, and taken as such.

    Returns:
        the largest label.

    Raises:
        ValueError: they cannot.
    """
    own = f"the network's own head has {classes} classes"
    folders = Path(data.name).expanduser().is_dir() and not has_columns(data.name)
    named = folders and not all(name.isdigit() for name in data.classes)
    if named and len(data.classes) != classes and not (more and len(data.classes) > classes):
        raise ValueError(
            f"{option}: {len(data.classes)} class folders with names, and {own}: which is which "
            f"cannot be told. Name the folders by the classes' numbers, 0..{classes - 1}"
        )
    top = max(int(s.labels.max()) for s in (data.train, data.val) if s is not None)
    if top >= classes and not more:
        raise ValueError(
            f"{option}: labels must be 0..{classes - 1}, as {own}; got {top}. Is it the data that "
            "the network was trained for?"
        )
    return top


def check_kinds(args: argparse.Namespace, splits: dict[str, Split]) -> None:
    """Of data as they were read, by the options that named them.

    Raises:
        ValueError: training and validation data are of different kinds; or options of images are
            given, and there are none to apply them to.
    """
    kinds = {name: _kind(split) for name, split in splits.items()}
    if "val" in kinds and kinds["val"] != kinds["train"]:
        raise ValueError(
            f"--data {args.data}: the training split is {kinds['train']}, the validation split "
            f"{kinds['val']}: they would be prepared differently; store both alike"
        )
    form = ("input_size", "resize", "interpolation", "mean", "std")
    given = [name for name in form if getattr(args, name)]
    other = next((name for name, kind in kinds.items() if kind != IMAGES), None)
    if given and other is not None:
        option = {"source": "source", "source_inputs": "source-inputs"}.get(other, "data")
        raise ValueError(
            f"--{given[0].replace('_', '-')} is for images, and --{option} is {kinds[other]}, "
            "handed to the network as it is: store uint8 images, or prepare the data and drop it"
        )


def _kind(split: Split) -> str:
    x = split.inputs
    if is_image_split(split):
        return IMAGES
    if isinstance(x, list):
        return "texts"
    if isinstance(x, dict):
        return f"arrays {', '.join(sorted(x))}"
    return "an array of floats" if x.dtype.kind == "f" else "an array of whole numbers"


def _check_shapes(
    args: argparse.Namespace, splits: dict[str, Split], ready: dict[str, Any]
) -> None:
    """Raise ValueError where samples of training and validation differ in shape. Those of whole
    numbers may be tokens, and padded to another length.
    """
    x = splits["train"].inputs
    if not is_image_split(splits["train"]) and (isinstance(x, (list, dict)) or x.dtype.kind != "f"):
        return
    if "val" not in ready:
        return
    first = {name: ready[name][0] for name in PARTS}
    train, val = (
        list(part.shape[1:] if isinstance(part, Tensor) else part[0].shape)
        for part in first.values()
    )
    if train != val:
        raise ValueError(
            f"--data {args.data}: training samples are {train}, validation samples {val}; they "
            "must be of one shape" + (" (--input-size)" if is_image_split(splits["train"]) else "")
        )


def _same_samples(source: NamedData, known: NamedData) -> bool:
    """Whether both come from the one split of one file or folder."""
    a, b = (Path(data.name).expanduser().resolve() for data in (source, known))
    return a == b and (source.train is None or source.val is None)


def _source_inputs(data: NamedData) -> Split:
    """In random order: folders are sorted by class, and not all samples are used."""
    split = data.train if data.train is not None else data.for_evaluation()
    order = np.random.default_rng(0).permutation(len(split))
    return split.subset(order[:LIMIT])


def try_forward(loaded: LoadedModel, data: Any) -> int:
    """Number of classes that the network answers.

    Raises:
        ValueError: the network cannot take the data; before anything is written.
    """
    from fast.data.dataset import as_data
    from fast.heads import evaluating, forward_logits

    inputs, _ = as_data(data, "train").batch_at(torch.arange(2))
    try:
        with evaluating(loaded.model):
            return forward_logits(loaded.model, inputs).shape[1]
    except Exception as error:
        shown = inputs if isinstance(inputs, dict) else {"x": inputs}
        shapes = ", ".join(f"{k} {list(v.shape)} {v.dtype}" for k, v in shown.items())
        raise ValueError(
            f"the network does not take these inputs ({shapes}, a batch of two): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def short_name(args: argparse.Namespace) -> str:
    """Network and data in a word each, for titles and folders."""
    return f"{_short(args.model)}-{_short(args.data)}"


def _short(name: str) -> str:
    """A name for folders: `path/nets.py:Net(20)` -> `Net`, `data/signs.npz` -> `signs`."""
    plain = name.split("(")[0].rstrip("/").removeprefix("hf:")
    if plain.startswith(("timm:", "torchvision:", "transformers:")) or ".py:" in plain:
        plain = plain.split(":")[-1]
    return Path(plain).name.removesuffix(".npz").replace(":", "-") or "data"
