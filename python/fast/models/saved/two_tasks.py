"""Read what `Result.save` wrote into one network that answers both tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fast.heads import TaskHead, attach_adapters, find_head, load_source_norms
from fast.models.saved.files import ADAPTERS_FILE, SOURCE_NORMS_FILE
from fast.models.saved.networks import (
    lacks_source,
    load_target,
    source_layer_in,
    source_norms_in,
)
from fast.tensor_files import load_tensors


def load_two_tasks(folder: Path, model: nn.Module, *, head: str | None, sample: Any = None) -> str:
    """Load the weights of a saved run into a plain architecture.

    Inside `fast.source_task` the network then answers the source task, and `fast.fold_head` makes
    it plain.

    Args:
        folder: the folder of the run, see `fast.models.saved.load_saved`; it has passed
            `check_manifest`.
        model: the plain architecture, with a head for any number of classes.
        head: name of the layer that makes the logits; with None it is found.
        sample: a batch of inputs by which the head is found, or None.

    Returns:
        what the folder lacks for the source task; empty where it lacks nothing. Where it does, the
        network has the target's head alone.

    Raises:
        FileNotFoundError, ValueError: see `load_saved`.
    """
    try:
        place = find_head(model, sample, head)
    except ValueError as error:
        raise ValueError(f"{folder} is of another network: {error}") from error
    target = load_target(folder, model, place)
    note = lacks_source(folder)
    if note:
        return note
    source = source_layer_in(folder, place).requires_grad_(False)
    heads = TaskHead(None, target, source)
    place.put(heads)
    norms = source_norms_in(folder)
    if norms:
        try:
            load_source_norms(model, norms)
        except ValueError as error:
            raise ValueError(f"{folder / SOURCE_NORMS_FILE}: {error}") from error
    if (folder / ADAPTERS_FILE).is_file():
        try:
            attach_adapters(model, load_tensors(folder / ADAPTERS_FILE), heads)
        except ValueError as error:
            raise ValueError(f"{folder / ADAPTERS_FILE}: {error}") from error
    return ""
