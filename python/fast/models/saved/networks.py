"""Write the networks of a run into its folder, and read them again as plain networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast.files import read_json_if_there
from fast.heads.adapters import adapter_state
from fast.heads.batch_norm import source_norms
from fast.heads.find import Head, HeadLayer, classes_of, find_head, is_plain, layer_like
from fast.heads.replace import announce_classes, fold_head, task_head
from fast.models.head_option import KEEP
from fast.models.saved.files import (
    ADAPTERS_FILE,
    MODEL_FILE,
    RESULT_FILE,
    SOURCE_HEAD_FILE,
    SOURCE_NORMS_FILE,
    check_manifest,
    read_options,
)
from fast.models.weights import lacking
from fast.tensor_files import load_into, load_tensors, write_tensors


@dataclass(kw_only=True)
class SavedNetworks:
    """Plain networks with the adapted weights.

    Attributes:
        target: the network that answers the target task.
        source: the network with the source's head, which answers the source task; None if the
            folder lacks what it needs.
        note: what the folder lacks; empty where it lacks nothing.
    """

    target: nn.Module
    source: nn.Module | None
    note: str = ""


def save_networks(model: nn.Module, folder: Path) -> None:
    """Write the plain target network of an adapted one, and what makes the source's network of it.

    Each file is written whole or not at all; files that an earlier network has left here, and that
    this one does not have, are removed.
    """
    head = task_head(model)
    per_task = {
        SOURCE_HEAD_FILE: {} if head is None else _plain_layer(head.source),
        SOURCE_NORMS_FILE: source_norms(model),
        ADAPTERS_FILE: adapter_state(model),
    }
    for name, tensors in per_task.items():
        if tensors:
            write_tensors(_plain_names(tensors), folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    target = fold_head(copy.deepcopy(model))
    write_tensors(_plain_names(target.state_dict()), folder / MODEL_FILE)


def load_saved(
    folder: str | Path, model: nn.Module, sample: Any = None, *, head: str | None = None
) -> SavedNetworks:
    """Read the networks of a saved run.

    Args:
        folder: the folder of the run. It has `model.safetensors`. The source network also needs
            `source_head.safetensors`; `source_norms.safetensors`, if each task has its own batch
            norms; and `adapters.safetensors`, if adapters have learned the target.
        model: the plain architecture, with a head for any number of classes; it becomes the target
            network.
        sample: a batch of inputs, by which the head is found.
        head: name of the head; with None it is found by the sample.

    Raises:
        FileNotFoundError: the folder has no `model.safetensors`.
        ValueError: a file is damaged or belongs to another result; or the weights belong to
            another network, and the message names the first that differ.
    """
    folder = Path(folder)
    check_manifest(folder)
    layer = find_head(model, sample, head)
    load_target(folder, model, layer)
    note = lacks_source(folder)
    if note:
        return SavedNetworks(target=model, source=None, note=note)
    return SavedNetworks(target=model, source=_source_network(folder, model, layer.name))


def _source_network(folder: Path, target: nn.Module, head: str) -> nn.Module:
    """A copy of the target's network with everything that the source has of its own."""
    source = copy.deepcopy(target)
    shapes = {name: value.shape for name, value in target.state_dict().items()}
    for file in (folder / SOURCE_NORMS_FILE, folder / ADAPTERS_FILE):
        if not file.is_file():
            continue
        tensors = {n: x for n, x in load_tensors(file).items() if not n.endswith((".A", ".B"))}
        odd = [n for n, x in tensors.items() if shapes.get(n) != x.shape]
        if odd:
            raise ValueError(f"{file} is of another network: it has {odd[0]}")
        load_into(source, tensors, strict=False)
    place = find_head(source, name=head)
    layer = source_layer_in(folder, place)
    place.put(layer)
    announce_classes(source, layer, classes_of(layer))
    return source


def load_target(folder: Path, model: nn.Module, head: Head) -> HeadLayer:
    """Make `model` the plain target network, with the layer of the target as its head.

    Returns:
        this layer.

    Raises:
        ValueError: the weights belong to another network.
    """
    file = folder / MODEL_FILE
    state = load_tensors(file)
    _take_dtypes(model, state)
    layer = head.module
    # A kept head may compute more than its weight and bias say; a new one is always plain.
    if is_plain(layer) or read_options(folder).get("head") != KEEP:
        layer = _layer_of(head, state, f"{head.name}.", file)
        head.put(layer)
    announce_classes(model, layer, classes_of(layer))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    wrong = lacking(state, shapes)
    wrong += [n for n in state if shapes.get(n) != state[n].shape]
    if wrong:
        raise ValueError(
            f"{file} is of another network: {len(wrong)} tensors differ, first "
            f"{', '.join(wrong[:3])}"
        )
    load_into(model, state, strict=False)
    return layer


def lacks_source(folder: Path) -> str:
    """Say what the folder lacks for the source task; empty if it has everything."""
    if not (folder / SOURCE_HEAD_FILE).is_file():
        return f"{folder} has no {SOURCE_HEAD_FILE}"
    plan = read_json_if_there(folder / RESULT_FILE).get("plan") or {}
    if plan.get("adapter_rank") and not (folder / ADAPTERS_FILE).is_file():
        return f"{folder}: the source's weights are below the adapters, which are not in the folder"
    per_task = (plan or read_options(folder)).get("batch_norm") == "per_task"
    if per_task and not (folder / SOURCE_NORMS_FILE).is_file():
        why = "the source's batch norm statistics were kept per task, and are not in the folder"
        return f"{folder}: {why}"
    return ""


def source_norms_in(folder: Path) -> dict[str, Tensor]:
    """The state of the source's batch norms; empty if both tasks share their batch norms."""
    file = folder / SOURCE_NORMS_FILE
    return load_tensors(file) if file.is_file() else {}


def source_layer_in(folder: Path, head: Head) -> HeadLayer:
    """The source's head, made like `head`."""
    file = folder / SOURCE_HEAD_FILE
    weights = load_tensors(file)
    layer = _layer_of(head, weights, "", file)
    layer.load_state_dict(weights)
    return layer


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the tensors of `model` the dtypes of `state`, so that loading rounds nothing."""
    for module_name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                new = state.get(f"{module_name}.{name}" if module_name else name)
                if value is None or new is None or not value.is_floating_point():
                    continue
                if new.is_floating_point() and new.dtype != value.dtype:
                    value.data = value.data.to(new.dtype)


def _layer_of(head: Head, state: dict[str, Tensor], prefix: str, file: Path) -> HeadLayer:
    """A layer like `head`, with as many classes as the weight in `state` has rows.

    Args:
        prefix: what the names of weight and bias begin with.
        file: where the state comes from, for the message.
    """
    weight = state.get(f"{prefix}weight")
    shape = head.module.weight.shape
    if weight is None or weight.shape[1:] != shape[1:]:
        there = "nothing" if weight is None else list(weight.shape)
        raise ValueError(
            f"{file} does not fit the head {head.name} {list(shape)}: it has {there} there"
        )
    return layer_like(head.module, weight.shape[0], bias=f"{prefix}bias" in state)


def _plain_layer(layer: nn.Module) -> dict[str, Tensor]:
    """The weight and the bias, even if they are computed from other parameters (weight norm)."""
    tensors = {"weight": layer.weight, "bias": layer.bias}
    return {name: x for name, x in tensors.items() if isinstance(x, Tensor)}


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state under the names that it has without `torch.compile` around parts of the network."""
    return {name.replace("_orig_mod.", ""): x for name, x in state.items()}
