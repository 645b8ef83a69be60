"""`fast.load` makes a predictor of a saved run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fast.data.images.format import ImageFormat
from fast.deploy.predictor import Predictor
from fast.deploy.rebuild import rebuilt
from fast.errors import printable
from fast.files import JOB_FILE, read_json, read_json_if_there, reading
from fast.heads.forward import LEAST_EVAL_BATCH
from fast.merge.joined import load_joined
from fast.models.device import pick_device
from fast.models.head_option import KEEP, head_name
from fast.models.loaded import LoadedModel
from fast.models.preparation import Preparation, read_preparation
from fast.models.saved import (
    DATA_FILE,
    JOIN_FILE,
    MODEL_FILE,
    RESULT_FILE,
    check_manifest,
    is_going_on,
    list_checkpoints,
    read_options,
)
from fast.models.saved.description import name_tasks
from fast.models.saved.two_tasks import load_two_tasks
from fast.models.signature import example

# What the card of an export says of the run.
REPORTED = ("target_accuracy", "source_accuracy", "source_accuracy_before")


def load(
    folder: str | Path,
    model: nn.Module | str | None = None,
    *,
    device: str | torch.device | None = None,
) -> Predictor:
    """Load what `Result.save` or `fast finetune` wrote, ready to predict.

        loaded = fast.load("runs/resnet18-photos-fast")
        loaded.predict("new/")                         # classes with probabilities
        loaded.predict("new/", task="source")          # the classes that it knew before
        loaded.evaluate("labelled/").accuracy

    A network that `Joined.save` or `fast join` wrote answers with the classes of both tasks.

    Args:
        folder: the folder of the run. Its files are compared with their checksums.
        model: the network, with any weights and a head for any number of classes; or its name, as
            --model takes it. Networks of timm, torchvision and transformers are built by the name
            that the run has saved. Any other must be passed, because code that a folder names is
            never run. A module that is passed becomes the loaded network; it may have been adapted.
        device: see `fast.finetune`.

    Raises:
        FileNotFoundError: the folder holds no result.
        ValueError: a file is damaged; the network is not known, or is another than the run's.
        ImportError: the library of the network is not installed.
    """
    folder = Path(folder).expanduser()
    check_result(folder)
    facts, options = read_json(folder / RESULT_FILE), read_options(folder)
    network = facts.get("network") or {}
    loaded = rebuilt(folder, network, model)
    answering, lacks = loaded.model, ""
    classes = _class_names(facts.get("classes"))
    source_classes = _class_names(network.get("source_classes"))
    preparation, inputs = _preparation(folder, loaded), facts.get("inputs")
    if (folder / JOIN_FILE).is_file():
        answering = load_joined(folder, loaded.model)
    else:
        head = network.get("head") or head_name(options.get("head"))
        sample = example(inputs) if inputs is not None else _sample(preparation)
        lacks = load_two_tasks(folder, loaded.model, head=head, sample=sample) or _untrained(folder)
        name_tasks(loaded.model, classes, source_classes)
    return Predictor(
        model=answering.to(pick_device(device)).eval(),
        classes=classes,
        source_classes=source_classes,
        preparation=preparation,
        inputs=inputs,
        name=network.get("name") or (model if isinstance(model, str) else None),
        precision=str(options.get("precision", "auto")),
        mirrored=bool(options.get("tta")),
        batch_size=max(LEAST_EVAL_BATCH, int(options.get("batch_size", LEAST_EVAL_BATCH))),
        keeps_head=options.get("head") == KEEP,
        lacks=lacks,
        facts={name: facts.get(name) for name in REPORTED} | {"method": options.get("method")},
        notes=[str(note) for note in facts.get("notes") or []],
    )


def check_result(folder: Path) -> None:
    """Check that a folder holds the whole result of a run.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: its run has no result yet, or a file is damaged.
    """
    if folder.is_dir() and not (folder / MODEL_FILE).is_file():
        _check_finished(folder)
    check_manifest(folder)


def _check_finished(folder: Path) -> None:
    """Raise ValueError where the folder belongs to a run that has no result yet."""
    if is_going_on(folder):
        raise ValueError(f"{folder}: its run is going on, and has no result yet")
    if list_checkpoints(folder):
        way = (
            f"fast finetune --resume {folder} goes on with it"
            if (folder / JOB_FILE).is_file()
            else f"go on with it (resume={str(folder)!r}), and save its result in a folder "
            "(result.save), which is what fast.load reads"
        )
        raise ValueError(f"{folder}: its run has checkpoints and no result: {way}")
    if (folder / JOB_FILE).is_file():
        raise ValueError(
            f"{folder}: its run was stopped before its first checkpoint: fast finetune --resume "
            f"{folder} starts it from the beginning"
        )


def _untrained(folder: Path) -> str:
    """Say that the source's head was in no checkpoint; empty where nothing says so."""
    head = read_json_if_there(folder / DATA_FILE).get("untrained_head")
    where = "was in no checkpoint, and answers by chance"
    return f"its head, {printable(head)}, {where}" if head else ""


def _preparation(folder: Path, loaded: LoadedModel) -> Preparation:
    """What the run has saved; an older run has it in its data.json, and in the network."""
    preparation = read_preparation(folder)
    file = folder / DATA_FILE
    if preparation.kind != "arrays" or not file.is_file():
        return preparation
    with reading(file):
        images = read_json(file).get("images")
        if images is not None:
            names = ("size", "resize", "stretch", "interpolation", "mean", "std", "channels")
            form = {name: images[name] for name in names}
            if form["resize"] == form["size"]:
                form["resize"] = None
            return replace(preparation, images=ImageFormat(**form))
    return replace(preparation, tokenizer=loaded.tokenizer)


def _sample(preparation: Preparation) -> Any:
    """Inputs to find the head by, where the run has not saved their shapes."""
    if preparation.tokenizer is not None:
        return preparation.tokens(["a", "a b"])
    form = preparation.images
    if form is None or form.size is None:
        return None
    channels = 1 if form.channels == 1 else 3
    return torch.zeros(2, channels, form.size, form.size)


def _class_names(names: Any) -> list[str] | None:
    return None if names is None else [str(name) for name in names]
