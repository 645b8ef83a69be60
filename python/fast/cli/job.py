"""From the options of model and data to what `fast.finetune` takes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.errors import printable
from fast.train.images import ImageFormat, is_image_split, prepare_images
from fast.train.known import LIMIT
from fast.train.models import LoadedModel, load_model
from fast.train.sources import NamedData, Split, has_columns, load_data

IMAGES = "images"


@dataclass
class Job:
    """One network and its data, prepared.

    train, val, source, source_inputs: `(x, y)` tensors or Datasets.
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

    @property
    def data(self) -> dict[str, Any]:
        """Keyword arguments of `fast.finetune`."""
        given = {"train": self.train, "val": self.val, "source": self.source}
        more = ("transform", "source_inputs", "card")
        given |= {name: getattr(self, name) for name in more if getattr(self, name) is not None}
        return given | {"num_classes": len(self.classes)}


def load_job(args: argparse.Namespace) -> Job:
    """Read model and data; what is wrong with them is raised here, before training."""
    columns = data_columns(args)
    target = load_data(args.data, **columns).with_val(args.val_fraction)
    if target.train is None:
        raise ValueError(f"--data {args.data}: has no training split")
    if len(target.classes) < 2:
        raise ValueError(f"--data {args.data}: has one class only, {target.classes[0]!r}")
    source = load_data(args.source, **columns, numeric_labels=True) if args.source else None

    loaded = load_model(args.model, args.weights, allow_missing=args.allow_missing)
    form = image_format(args, loaded)
    splits = {"train": target.train, "val": target.for_evaluation()}
    if source is not None:
        splits["source"] = source.for_evaluation()
    known = None
    if getattr(args, "source_inputs", None):
        known = load_data(args.source_inputs, **columns, numeric_labels=True)
        splits["source_inputs"] = _source_inputs(known)
        if source is not None and _same_samples(source, known):
            loaded.notes.append(
                f"--source-inputs {args.source_inputs}: the same samples as --source: what is kept "
                "is measured on what it is kept with, and looks better than it is; name others"
            )
    check_kinds(args, splits)
    ready = {name: prepare(split, loaded, form, args.max_length) for name, split in splits.items()}
    _check_shapes(args, splits, ready)
    classes = try_forward(loaded, ready["train"])
    if source is not None:
        check_source(f"--source {args.source}", source, classes)
    # Where the skill is in the features, labels need not be the head's.
    if known is not None and getattr(args, "source_skill", None) != "features":
        top = check_source(f"--source-inputs {args.source_inputs}", known, classes, more=True)
        if top >= classes and getattr(args, "source_skill", "auto") == "auto":
            loaded.notes.append(
                f"--source-inputs {args.source_inputs}: label {top}, and the network's own head "
                f"has {classes} classes: what is forgotten is measured by its features, not by its "
                "answers (--source-skill)"
            )
    loaded.notes += _gaps(args, target)
    for note in loaded.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    return Job(
        loaded,
        ready["train"],
        ready["val"],
        ready.get("source"),
        target.classes,
        short_name(args),
        random_flip if args.flip else None,
        {name: len(split) for name, split in splits.items()},
        ready.get("source_inputs"),
        getattr(args, "card", None),
    )


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
    given = [name for name in ("input_size", "mean", "std") if getattr(args, name)]
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
    first = {name: ready[name][0] for name in ("train", "val")}
    train, val = (
        list(part.shape[1:] if isinstance(part, Tensor) else part[0].shape)
        for part in first.values()
    )
    if train != val:
        raise ValueError(
            f"--data {args.data}: training samples are {train}, validation samples {val}; they "
            "must be of one shape" + (" (--input-size)" if is_image_split(splits["train"]) else "")
        )


def _gaps(args: argparse.Namespace, target: NamedData) -> list[str]:
    assert target.train is not None
    missing = np.setdiff1d(np.arange(len(target.classes)), target.train.labels)
    if not len(missing):
        return []
    shown = ", ".join(target.classes[i] for i in missing[:3]) + (
        ", ..." if len(missing) > 3 else ""
    )
    return [
        f"--data {args.data}: {len(missing)} of {len(target.classes)} classes have no training "
        f"sample ({shown}); the head has a place for each"
    ]


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
    from fast.heads import evaluating, forward_logits
    from fast.train.data import as_data

    inputs, _ = as_data(data, "train").batch_at(torch.arange(2))
    try:
        with evaluating(loaded.model):
            return forward_logits(loaded.model, inputs).shape[1]
    except Exception as error:
        shown = inputs if isinstance(inputs, dict) else {"x": inputs}
        shapes = ", ".join(f"{k} {list(v.shape)} {v.dtype}" for k, v in shown.items())
        raise ValueError(
            f"the network does not take these inputs ({shapes}, a batch of two): {error}"
        ) from error


def image_format(args: argparse.Namespace, loaded: LoadedModel) -> ImageFormat:
    """What was asked for, else what the network says, else the images as they are, in -1..1."""
    return ImageFormat(
        args.input_size or loaded.size,
        args.mean or loaded.mean or (0.5,),
        args.std or loaded.std or (0.5,),
        loaded.channels,
    )


def prepare(split: Split, loaded: LoadedModel, form: ImageFormat, max_length: int) -> Any:
    """One split as `(x, y)` tensors, or a Dataset where it is too large for memory."""
    if is_image_split(split):
        return prepare_images(split, form)
    labels = torch.from_numpy(split.labels)
    if isinstance(split.inputs, list):
        if loaded.tokenizer is None:
            raise ValueError("the data are texts: only a transformers: network brings a tokenizer")
        tokens = loaded.tokenizer(
            split.inputs,
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        return dict(tokens), labels
    if isinstance(split.inputs, dict):
        return {name: _tensor(value) for name, value in split.inputs.items()}, labels
    return _tensor(split.inputs), labels


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image `[B, C, H, W]` with probability 1/2."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise ValueError("--flip needs images")
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(3), images)


def _tensor(x: np.ndarray) -> Tensor:
    # Files hold types and byte orders that torch does not have.
    return torch.from_numpy(
        np.ascontiguousarray(x, np.float32 if x.dtype.kind == "f" else np.int64)
    )


def short_name(args: argparse.Namespace) -> str:
    """Network and data in a word each, for titles and folders."""
    return f"{_short(args.model)}-{_short(args.data)}"


def _short(name: str) -> str:
    """A name for folders: `path/nets.py:Net(20)` -> `Net`, `data/signs.npz` -> `signs`."""
    plain = name.split("(")[0].rstrip("/").removeprefix("hf:")
    if plain.startswith(("timm:", "torchvision:", "transformers:")) or ".py:" in plain:
        plain = plain.split(":")[-1]
    return Path(plain).name.removesuffix(".npz").replace(":", "-") or "data"
