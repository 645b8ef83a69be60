"""Command-line options: those of the training from `TrainConfig`, and those of model and data."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from fast.train.config import TrainConfig

NORMALISATIONS: dict[str, dict[str, tuple[float, ...]]] = {
    "mean": {"imagenet": (0.485, 0.456, 0.406), "none": (0.0,)},
    "std": {"imagenet": (0.229, 0.224, 0.225), "none": (1.0,)},
}


# Of each class, where there is no split of held-out samples.
VAL_FRACTION = 0.2


def add_model_and_data(parser: argparse.ArgumentParser, protection: bool = False) -> None:
    """Args:
    protection: also what a method may know of the source task.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="SPEC",
        help="timm:NAME, torchvision:NAME, transformers:NAME or path/file.py:Factory(args)",
    )
    group.add_argument(
        "--weights", metavar="FILE", help="its weights: safetensors, or a torch state dict"
    )
    group.add_argument(
        "--allow-missing", action="store_true", help="weights may lack tensors of the network"
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DATA",
        help="target task: folder of class folders, .npz, or Hugging Face OWNER/NAME",
    )
    group.add_argument(
        "--source", metavar="DATA", help="source task, labelled as the network's own head is"
    )
    if protection:
        group.add_argument(
            "--source-inputs",
            metavar="DATA",
            help="a few hundred other samples of the source task, labelled as --source is: what "
            "must be kept; its training split where there is one",
        )
        group.add_argument(
            "--card", metavar="FILE", help="fast.SourceCard of these weights: what must be kept"
        )
    group.add_argument(
        "--val-fraction",
        type=share,
        default=VAL_FRACTION,
        metavar="X",
        help="share of each class held out where there is no val or test split; 0: train on all "
        "(default: 0.2)",
    )
    group.add_argument(
        "--input-size",
        type=at_least_one,
        metavar="N",
        help="side of the images (default: the network's, else as they are)",
    )
    group.add_argument(
        "--resize",
        type=at_least_one,
        metavar="N",
        help="their shorter side before the central square is taken (default: as the network was "
        "trained, else --input-size)",
    )
    group.add_argument(
        "--interpolation",
        choices=("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"),
        help="of resized images (default: the network's, else bicubic)",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            type=_named_values(name),
            metavar="X[,X,X]",
            help=f"{name} of images in 0..1, by channel; or imagenet, or none (default: the "
            "network's; needed where it does not say)",
        )
    group.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be read, and count them",
    )
    group.add_argument("--flip", action="store_true", help="mirror training images at random")
    group.add_argument(
        "--input-column", metavar="NAME", help="inputs of a Hugging Face data set (default: found)"
    )
    group.add_argument("--label-column", metavar="NAME", help="its labels (default: found)")
    group.add_argument(
        "--max-length",
        type=at_least_one,
        default=128,
        metavar="N",
        help="tokens of a text (default: 128)",
    )


def add_training(parser: argparse.ArgumentParser, skip: Iterable[str] = ()) -> None:
    """One option for each field of `TrainConfig`; those not given stay out of the namespace."""
    group = parser.add_argument_group("training")
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" (default: {field.default})"
        kind = _plain_type(hints[field.name])
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif field.metadata["choices"]:
            group.add_argument(flag, choices=field.metadata["choices"], **common)
        elif field.name == "class_weights":
            group.add_argument(flag, type=_class_weights, metavar="X,X,...", **common)
        else:
            if field.name in ("output", "resume"):
                kind = folder_name
            metavar = "N" if kind is int else "X" if kind is float else "NAME"
            group.add_argument(flag, type=kind, metavar=metavar, **common)


def training_options(args: argparse.Namespace) -> dict[str, Any]:
    """The `TrainConfig` fields given on the command line."""
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def check_training(args: argparse.Namespace, **changed: Any) -> None:
    """Raise what is wrong with the options of the training before anything is read or written."""
    from fast.train.device import pick_device

    TrainConfig(**(training_options(args) | changed))
    pick_device(getattr(args, "device", None))


_UNSET = object()


def mark_unset(parser: argparse.ArgumentParser) -> None:
    """Let `fill_defaults` tell an option that is given at its default from one that is not given.

    Call it when all options are there.
    """
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**dict.fromkeys(defaults, _UNSET), unset=defaults, parser=parser)


def fill_defaults(args: argparse.Namespace) -> set[str]:
    """Set what was not given to its default.

    Returns:
        names of the options that were given.
    """
    given = set(vars(args)) - {"run", "unset", "parser"}
    for name, default in args.unset.items():
        if getattr(args, name) is _UNSET:
            setattr(args, name, default)
            given.remove(name)
    return given


def require(args: argparse.Namespace, *names: str) -> None:
    """Raise where an option is missing; argparse cannot, because --resume makes them optional."""
    missing = [f"--{name}" for name in names if not getattr(args, name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given; see --help")


def folder_name(text: str) -> str:
    """With `~` as the user's home, also after `--output=`, where shells leave it."""
    if not text:
        raise argparse.ArgumentTypeError("a folder, not an empty name")
    return os.path.expanduser(text)


def share(text: str) -> float:
    """`"0.2"` -> 0.2; 0 is a share, 1 is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a share from 0 to less than 1, as 0.2, not {text!r}")
    return value


def at_least_one(text: str) -> int:
    """`"12"` -> 12."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number, at least 1, not {text!r}")
    return int(text)


def numbers(text: str) -> tuple[float, ...]:
    """`"0.5,0.4"` -> `(0.5, 0.4)`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers separated by commas, not {text!r}") from None


def _named_values(name: str) -> Callable[[str], tuple[float, ...]]:
    """Reads the values of --mean or --std."""
    known = NORMALISATIONS[name]

    def parse(text: str) -> tuple[float, ...]:
        return known[text] if text in known else numbers(text)

    return parse


def _class_weights(text: str) -> str | tuple[float, ...]:
    return text if text == "balanced" else numbers(text)


def _plain_type(hint: Any) -> Callable[[str], Any]:
    """`int | None` -> `int`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint
