"""Write a checkpoint in the form that timm's models on the hub have."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch

from fast.deploy.export.subject import Subject
from fast.errors import first_line
from fast.heads.forward import forward_logits

FILE = "model.safetensors"


def write_timm(subject: Subject, folder: Path) -> None:
    """Write weights and `config.json`, for `timm.create_model("local-dir:FOLDER")`; the weights
    also load with `create_model(NAME, num_classes=C, checkpoint_path=...)`.

    Raises:
        ValueError: timm does not have the network, or cannot build it again.
    """
    subject.check_library("timm")
    network: Any = subject.network
    import timm
    from timm.models import save_for_hf

    save_for_hf(
        network,
        str(folder),
        model_config={"label_names": subject.classes},
        model_args=_arguments(subject.spec),
        data_config=_data_config(subject),
        safe_serialization=True,
    )
    try:
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm raises errors of many kinds
        raise ValueError(f"timm cannot build this network again: {first_line(error)}") from error
    with torch.no_grad():
        subject.check(forward_logits(again, subject.sample), subject.sample, FILE)
    subject.write_description(folder)


def _arguments(spec: str | None) -> dict[str, Any]:
    """The arguments in `timm:NAME(k=v)`, without those that the export itself decides."""
    _, bracket, rest = (spec or "").partition("(")
    if not bracket:
        return {}
    call: Any = ast.parse(f"f({rest}", mode="eval").body
    arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    return {k: v for k, v in arguments.items() if k not in ("num_classes", "pretrained")}


def _data_config(subject: Subject) -> dict[str, Any]:
    """The preprocessing of the run, in timm's words."""
    form = subject.preparation.images
    if form is None:
        return {}
    channels = subject.tensors()[0].shape[1]
    config: dict[str, Any] = {
        "mean": tuple(form.mean) if len(form.mean) > 1 else (*form.mean,) * channels,
        "std": tuple(form.std) if len(form.std) > 1 else (*form.std,) * channels,
        "interpolation": form.interpolation,
        "crop_mode": "squash" if form.stretch else "center",
    }
    if form.size is not None:
        config["input_size"] = (channels, form.size, form.size)
        config["crop_pct"] = form.size / (form.resize or form.size)
    return config
