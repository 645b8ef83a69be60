"""Describe a network beside its weights: how it is built again, and which classes it has."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from torch import nn

from fast.files import read_json_if_there
from fast.heads import classes_of, places_of, task_head, unwrap
from fast.heads.replace import class_labels, made_up_names, name_classes
from fast.models.load import parse_spec
from fast.models.preparation import PREPARATION_FILE
from fast.models.saved.files import (
    CONFIG_FILE,
    JOIN_FILE,
    OPTIONS_FILE,
    RESULT_FILE,
    WEIGHT_FILES,
    is_library_config,
)

# Arguments of a library's network whose head may not be that of its pretrained weights.
_OTHER_HEAD = {"num_classes", "pretrained", "weights"}


def describe_network(model: nn.Module, name: str | None) -> dict[str, Any]:
    """The entry `network` of result.json: facts of an adapted network, as plain values.

    Args:
        name: the name of the network, as --model takes it; None where it was given as an object.
    """
    model = unwrap(model)
    head = task_head(model)
    return {
        "name": name or _name_in_timm(model),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "head": None if head is None else places_of(model, head)[0][2],
        "source_classes": source_classes(model, name),
    }


def _name_in_timm(model: nn.Module) -> str | None:
    """The name by which timm builds this network again, with the arguments that it remembers.

    It is None for a network of another library, or where an argument is not a plain value.
    """
    config = getattr(model, "pretrained_cfg", None)
    arguments = getattr(model, "_model_args", None)
    if config is None or arguments is None or not is_timm(model):
        return None
    text = ", ".join(f"{key}={value!r}" for key, value in sorted(arguments.items()))
    spec = f"timm:{config['architecture']}({text})"
    try:
        parse_spec(spec)
    except ValueError:
        return None
    return spec


def save_library_config(model: nn.Module, folder: Path, classes: list[str] | None) -> None:
    """Write the `config.json` of a transformers network, with the names of its classes.

    Other networks have no such file, and one that is left of an earlier run is removed.
    """
    model, file = unwrap(model), folder / CONFIG_FILE
    if not is_transformers(model):
        if is_library_config(file) or (folder / OPTIONS_FILE).is_file():
            file.unlink(missing_ok=True)
        return
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    name_classes(config, classes)
    config.save_pretrained(folder)


def name_tasks(model: nn.Module, classes: list[str] | None, source: list[str] | None) -> None:
    """Give a transformers network the names of both tasks' classes; `source_task` switches them."""
    config, head = getattr(unwrap(model), "config", None), task_head(model)
    name_classes(config, classes)
    if head is not None and hasattr(config, "id2label"):
        head.source_labels = class_labels(source or made_up_names(classes_of(head.source)))


def is_timm(model: nn.Module) -> bool:
    """Whether a network's class belongs to timm."""
    return type(model).__module__.startswith("timm.")


def is_transformers(model: nn.Module) -> bool:
    """Whether a network's class belongs to transformers, so that its config builds it again."""
    library = sys.modules.get("transformers")
    return (
        library is not None
        and isinstance(model, library.PreTrainedModel)
        and type(model).__module__.startswith("transformers.")
    )


def own_classes(model: nn.Module, name: str | None, weights: str | None) -> list[str] | None:
    """The names of the classes of a network as it was loaded; None where nothing says them.

    Args:
        name, weights: as --model and --weights take them. Weights may be of the folder of a run.
    """
    if weights is not None:
        return classes_beside(weights) or announced_classes(model)
    names = announced_classes(model)
    if names is None and name is not None and not _OTHER_HEAD & set(parse_spec(name)[3]):
        names = _library_classes(unwrap(model), name)
    return names


def classes_beside(weights: str | Path) -> list[str] | None:
    """The names of the classes of a network whose weights were saved with a description: by a run,
    by an export, or by timm or transformers. None where there is none.

    Args:
        weights: the file of the weights, or its folder.
    """
    path = Path(weights).expanduser()
    if not path.is_dir() and path.name not in WEIGHT_FILES:
        return None
    folder = path if path.is_dir() else path.parent
    run, export, config, join = (
        read_json_if_there(folder / name)
        for name in (RESULT_FILE, PREPARATION_FILE, CONFIG_FILE, JOIN_FILE)
    )
    if rows := _strings(join, "rows"):  # of two passes, the weights are the target's
        return rows if join.get("passes") == 1 else rows[join["source_rows"] :]
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not all(i.isdecimal() for i in labels):
        labels = {}
    return (
        _strings(run, "classes")
        or _strings(export, "outputs", "logits", "classes")
        or _names({int(i): name for i, name in labels.items()})
        or _strings(config, "label_names")
    )


def _strings(value: Any, *keys: str) -> list[str] | None:
    """The list of strings under these keys, one inside the other; None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value if is_list else None


def announced_classes(model: nn.Module) -> list[str] | None:
    """The names that a transformers network has for the classes of the task that it answers now."""
    labels = getattr(getattr(unwrap(model), "config", None), "id2label", None)
    return _names(labels) if isinstance(labels, dict) and labels else None


def _names(labels: dict[int, str]) -> list[str] | None:
    """The names in an `id2label`; None where they are the `LABEL_0` that transformers makes up."""
    names = [str(labels[i]) for i in sorted(labels)]
    made_up = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return None if made_up else names


def source_classes(model: nn.Module, name: str | None) -> list[str] | None:
    """The names of the source task's classes; None where neither the network nor its library has
    them.

    Args:
        model: the adapted network.
        name: see `describe_network`.
    """
    head = task_head(unwrap(model))
    labels = head.source_labels.get("id2label") if head is not None else None
    if labels:
        return _names(labels)
    names = _library_classes(unwrap(model), name)
    fits = head is not None and names is not None and len(names) == len(head.source.weight)
    return names if fits else None


def _library_classes(model: nn.Module, name: str | None) -> list[str] | None:
    """The names that a library has for the classes of its pretrained weights."""
    library, _, rest = (name or "").partition(":")
    if library not in ("timm", "torchvision"):
        return None
    return (_timm if library == "timm" else _torchvision)(model, rest)


def _torchvision(model: nn.Module, name: str) -> list[str] | None:
    from torchvision import models

    weights = models.get_model_weights(name.partition("(")[0].strip()).DEFAULT
    return weights.meta.get("categories")


def _timm(model: nn.Module, name: str) -> list[str] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = getattr(model, "pretrained_cfg", None) or {}
    subset = infer_imagenet_subset(config)
    if config.get("label_names") or subset is None:
        return list(config["label_names"]) if config.get("label_names") else None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]
