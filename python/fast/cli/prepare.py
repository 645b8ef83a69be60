"""From data as read to tensors, as the options and the network have it."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.images.format import ImageFormat
from fast.data.images.pixels import (
    SKIP,
    ImageReport,
    PreparedImages,
    is_image_split,
    merged,
    prepare_images,
)
from fast.data.sources import Split
from fast.errors import some
from fast.models.load import LoadedModel


def image_format(
    args: argparse.Namespace, loaded: LoadedModel, splits: dict[str, Split]
) -> ImageFormat:
    """What was asked for, else what the network says; else the images as they are.

    Raises:
        ValueError: there are images, and nobody says how they are to be normalised.
    """
    says = loaded.preprocessing
    mean, std = args.mean or says.mean, args.std or says.std
    if not any(map(is_image_split, splits.values())):
        mean, std = mean or (0.0,), std or (1.0,)
    if mean is None or std is None:
        raise ValueError(
            f"--mean and --std: the network {args.model} does not say how its inputs were "
            f"normalised; pass {'both' if mean is std is None else 'the other, too'}: imagenet "
            "(.485,.456,.406 and .229,.224,.225), none (inputs in 0..1), or numbers (0.5 and 0.5: "
            "inputs in -1..1)"
        )
    size = args.input_size or says.size
    resize = args.resize
    if resize is None and says.size and says.resize and size:
        resize = round(size * says.resize / says.size)
    return ImageFormat(
        size=size,
        mean=mean,
        std=std,
        channels=loaded.channels,
        resize=resize,
        stretch=says.stretch,
        interpolation=args.interpolation or says.interpolation,
    )


def given_form(args: argparse.Namespace) -> set[str]:
    """What of the image format is given by options."""
    options = {"size": "input_size", "mean": "mean", "std": "std"}
    return {name for name, option in options.items() if getattr(args, option)}


def prepare(
    split: Split,
    loaded: LoadedModel,
    form: ImageFormat,
    max_length: int,
    report: ImageReport | None = None,
) -> Any:
    """One split as `(x, y)` tensors, or a Dataset where it is too large for memory.

    Args:
        report: takes images that cannot be read; None: they are an error.
    """
    if is_image_split(split):
        if loaded.tokenizer is not None:
            raise ValueError("the data are images, and the network reads texts")
        return prepare_images(split, form, report)
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


def labels_of(data: Any) -> np.ndarray:
    """Of what `prepare` returns."""
    return (data.labels if isinstance(data, PreparedImages) else data[1]).numpy()


def broken_images(args: argparse.Namespace, *reports: ImageReport) -> list[str]:
    """A note on those that are left out.

    Raises:
        ValueError: they are not to be left out.
    """
    report = merged(reports)
    if not args.skip_broken:
        report.refuse_broken(SKIP)
    if not report.broken:
        return []
    return [
        f"--skip-broken: {len(report.broken)} images cannot be read, and are left out: "
        f"{some(list(report.broken), 10)}"
    ]
