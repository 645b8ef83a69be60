"""Read what `Result.save` wrote as one network that answers both tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fast.heads import TaskHead, find_head, load_source_norms
from fast.models.saved import (
    SOURCE_NORMS_FILE,
    lacks_source,
    load_target,
    source_layer_in,
    source_norms_in,
)


def load_two_tasks(folder: Path, model: nn.Module, *, head: str | None, sample: Any = None) -> str:
    """Load the weights of a saved run, in place; inside `fast.source_task` the network then answers
    the source task, and `fast.fold_head` makes it plain.

    Args:
        folder: see `fast.models.saved.load_saved`; `check_manifest` has been asked about it.
        model: the plain architecture, with a head for any number of classes.
        head: name of the layer that makes the logits; None to find it.
        sample: a batch of inputs to find it by, or None.

    Returns:
        what the folder lacks for the source task; the network then has the target's head alone.

    Raises:
        FileNotFoundError, ValueError: as `load_saved`.
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
    place.put(TaskHead(None, target, source))
    norms = source_norms_in(folder)
    if norms:
        try:
            load_source_norms(model, norms)
        except ValueError as error:
            raise ValueError(f"{folder / SOURCE_NORMS_FILE}: {error}") from error
    return ""
