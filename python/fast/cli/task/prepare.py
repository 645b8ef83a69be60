"""Turn stored data into tensors, as the options and the network say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.cli.spec.task import TaskSpec
from fast.cli.task.checks import check_kinds
from fast.data.audio.waveforms import SoundFormat
from fast.data.dataset import as_data
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import PreparedImages, is_image_split, prepare_images
from fast.data.sources import EncodedAudio, FileReport, Split
from fast.errors import some
from fast.heads import evaluating, forward_logits
from fast.heads.forward import check_logits, input_errors
from fast.models.load import load_model
from fast.models.loaded import LoadedModel
from fast.models.preparation import Preparation, most_tokens
from fast.workers import workers_for


def load_network(spec: TaskSpec, pretrained: bool = True) -> LoadedModel:
    """The network that --model names."""
    assert spec.model is not None
    return load_model(
        spec.model, spec.weights, allow_missing=spec.allow_missing, pretrained=pretrained
    )


def prepare_splits(
    spec: TaskSpec,
    loaded: LoadedModel,
    splits: dict[str, Split],
    workers: int | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Any], Preparation, dict[str, FileReport]]:
    """Each split as `(x, y)` tensors, or as a Dataset if it is too large for memory; how they were
    prepared; and a report on the files of each split.

    Args:
        workers: how many processes decode images; None: as many as are useful.
        progress: see `prepare_images`.

    Raises:
        ValueError: the data do not fit the network, the options or each other.
    """
    preparation = _preparation(spec, loaded, splits)
    check_kinds(spec, splits, preparation.images)
    reports = {name: FileReport() for name in splits}
    prepared = {
        name: prepare_images(
            split,
            preparation.images,
            reports[name],
            augment=spec.augment if name == "train" else "none",
            workers=workers_for(len(split)) if workers is None else workers,
            progress=progress,
        )
        if preparation.images is not None and is_image_split(split)
        else preparation(split, reports[name])
        for name, split in splits.items()
    }
    whole = FileReport.merged(reports.values(), skips=spec.skip_broken)
    whole.check(any_read=True)
    if whole.broken:
        count = len(whole.broken)
        many = f"{count} {whole.kind}s cannot be read, and are"
        what = f"1 {whole.kind} cannot be read, and is" if count == 1 else many
        loaded.notes.append(f"--skip-broken: {what} left out: {some(list(whole.broken), 10)}")
    if preparation.sounds is not None:
        first = next(split for split in splits.values() if isinstance(split.inputs, EncodedAudio))
        sounds = preparation.sounds.with_rate_of(first)
        preparation = dataclasses.replace(preparation, sounds=sounds)
    return prepared, preparation, reports


def _preparation(spec: TaskSpec, loaded: LoadedModel, splits: dict[str, Split]) -> Preparation:
    """How inputs of the kinds in these splits are prepared.

    Raises:
        ValueError: the network takes another kind, or nobody says how images are to be normalised.
    """
    takes = "texts" if loaded.tokenizer else "sounds" if loaded.extractor else None
    if takes is None and loaded.preprocessing.library:
        takes = "images"
    images = sounds = None
    if any(map(is_image_split, splits.values())):
        if takes not in (None, "images"):
            raise ValueError(f"the data are images, and the network takes {takes}")
        images = _image_format(spec, loaded)
    if any(isinstance(split.inputs, EncodedAudio) for split in splits.values()):
        if takes not in (None, "sounds"):
            raise ValueError(f"the data are sounds, and the network takes {takes}")
        rate = None if loaded.extractor is None else int(loaded.extractor.sampling_rate)
        sounds = SoundFormat(seconds=spec.max_seconds, rate=rate, extractor=loaded.extractor)
    length = spec.max_length
    most = most_tokens(loaded.model, loaded.tokenizer) if loaded.tokenizer else None
    if most is not None and most < length:
        loaded.notes.append(f"texts are cut to {most} tokens: the network takes no more")
        length = most
    return Preparation(images=images, sounds=sounds, tokenizer=loaded.tokenizer, max_length=length)


def _image_format(spec: TaskSpec, loaded: LoadedModel) -> ImageFormat:
    """How images are prepared: as the options say, else as the network says, else not at all.

    Raises:
        ValueError: nobody says how the images are to be normalised.
    """
    says = loaded.preprocessing
    mean, std = spec.mean or says.mean, spec.std or says.std
    if mean is None or std is None:
        raise ValueError(
            f"--mean and --std: the network {spec.model} does not say how its inputs were "
            f"normalised; pass {'both' if mean is std is None else 'the other, too'}: imagenet "
            "(.485,.456,.406 and .229,.224,.225), none (inputs in 0..1), or numbers (0.5 and 0.5: "
            "inputs in -1..1)"
        )
    size, resize = spec.input_size or says.size, spec.resize
    if resize is None and says.size and says.resize and size:
        resize = round(size * says.resize / says.size)
    options = (spec.input_size, spec.resize, spec.interpolation, spec.mean, spec.std)
    library = None if any(options) else says.library
    return ImageFormat(
        size=size,
        mean=mean,
        std=std,
        channels=loaded.channels or (3 if library else None),
        library=library,
        resize=resize,
        stretch=says.stretch,
        interpolation=spec.interpolation or says.interpolation,
    )


def labels_of(prepared: Any) -> np.ndarray:
    """The labels of a prepared split, int64 `[N]`."""
    return (prepared.labels if isinstance(prepared, PreparedImages) else prepared[1]).numpy()


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image `[B, C, H, W]` with probability 1/2."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise ValueError("--flip needs images")
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def try_forward(loaded: LoadedModel, prepared: Any) -> int:
    """Try the network on two samples, before anything is written.

    Returns:
        its number of classes.

    Raises:
        ValueError: the network cannot take the data, or has no logits of classes.
    """
    data = as_data(prepared, "--data")
    inputs, _ = data.batch_at(torch.arange(2))
    with input_errors(data.name, inputs, loaded.model), evaluating(loaded.model):
        logits = forward_logits(loaded.model, inputs)
    check_logits(logits)
    return logits.shape[1]
