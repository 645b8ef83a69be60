"""Write a folder that `from_pretrained` and `pipeline()` of transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fast.data.images.format import BGR, ImageFormat
from fast.deploy.export.subject import Subject
from fast.heads.forward import forward_logits
from fast.heads.replace import name_classes
from fast.models.libraries import quiet

PILLOW_FILTERS = {
    "nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5,
}  # fmt: skip


def write_hugging_face(subject: Subject, folder: Path) -> None:
    """Write the weights, a configuration with the names of the classes, and what prepares inputs.

    Raises:
        ValueError: transformers does not have the network; or its head has no bias there, and
            the adapted head needs one.
    """
    subject.check_library("hf")
    network: Any = subject.network
    import transformers

    with quiet(transformers):
        _write(subject, network, folder)
        _check(subject, folder)


def _write(subject: Subject, network: Any, folder: Path) -> None:
    name_classes(network.config, subject.classes)
    if getattr(network.config, "problem_type", None) is not None:  # a pipeline reads the source's
        network.config.problem_type = "single_label_classification"
    network.config.architectures = [type(network).__name__]
    network.save_pretrained(folder)
    subject.write_description(folder)
    if subject.preparation.images is not None:
        _write_processor(subject.preparation.images, folder)
    if subject.preparation.tokenizer is not None:
        tokenizer = subject.preparation.tokenizer
        before = tokenizer.model_max_length
        tokenizer.model_max_length = subject.preparation.max_length
        try:
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.model_max_length = before


def _check(subject: Subject, folder: Path) -> None:
    again, info = type(subject.network).from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    unexpected = sorted(info["unexpected_keys"])
    if f"{subject.head}.bias" in unexpected:
        raise ValueError(
            f"format 'hf': {type(subject.network).__name__} has no bias in its head "
            f"{subject.head}, and the adapted head has one (the mean of the features is part of "
            "it): use 'onnx', 'torch.export' or 'safetensors', or train with max_entropy=False"
        )
    with torch.no_grad():
        subject.check(forward_logits(again.eval(), subject.sample), subject.sample, str(folder))


def _write_processor(form: ImageFormat, folder: Path) -> None:
    """Write an image processor that resizes, crops and normalises as the run did; where the run
    used the network's own, it is that one."""
    import transformers

    if form.library and "processor" in form.library:
        processor = form.library["processor"]
        kind = getattr(transformers, str(processor["image_processor_type"]))
        kind.from_dict(dict(processor)).save_pretrained(folder)
        return
    if form.size is None or form.channels not in (3, None):
        what = "no size" if form.size is None else f"channels {form.channels}"
        if form.channels == BGR:
            what = "blue first"
        raise ValueError(
            f"format 'hf': no image processor of transformers does what the run did ({what}): use "
            "'onnx', 'torch.export' or 'safetensors'"
        )
    side = form.resize or form.size
    size = {"height": side, "width": side} if form.stretch else {"shortest_edge": side}
    transformers.CLIPImageProcessorPil(
        size=size,
        crop_size={"height": form.size, "width": form.size},
        resample=PILLOW_FILTERS[form.interpolation],
        image_mean=_three(form.mean),
        image_std=_three(form.std),
    ).save_pretrained(folder)


def _three(values: Any) -> list[float]:
    return [float(v) for v in (values if len(values) == 3 else (*values,) * 3)]
