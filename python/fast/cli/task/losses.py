"""The losses that `fast curvature` looks at: networks with batches of their data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast.cli.notes import print_notes
from fast.cli.options import flag
from fast.cli.spec.curvature import CurvatureSpec
from fast.cli.task.checks import check_numbers
from fast.cli.task.data import numbered_as_in_head, read_data
from fast.cli.task.prepare import load_network, prepare_splits, try_forward
from fast.data.dataset import Data, as_data
from fast.data.labels import check_labels
from fast.data.trees import move
from fast.heads import evaluating, forward_logits
from fast.heads.forward import check_logits
from fast.models.device import pick_device
from fast.models.loaded import LoadedModel
from fast.models.saved import load_saved
from fast.models.saved.description import own_classes

# Losses by the options that name their data, in the order in which they are shown.
TASKS = {"source": "source", "target": "data"}


@dataclass(kw_only=True)
class TaskLoss:
    """The loss of a task: the network that answers it, and batches (inputs, labels) of its data."""

    name: str
    model: nn.Module
    batches: list[tuple[Any, Tensor]]
    data: str

    @property
    def samples(self) -> int:
        return sum(len(y) for _, y in self.batches)


def losses_of(spec: CurvatureSpec) -> list[TaskLoss]:
    """The losses of the tasks for which there are data; their networks are in eval mode."""
    device = pick_device(spec.device)
    sets, notes = read_data(spec.task)
    loaded = load_network(spec.task, pretrained=not spec.checkpoint)
    if "source" in sets:
        names = own_classes(loaded.model, spec.task.model, spec.task.weights)
        sets["source"] = numbered_as_in_head(sets["source"], names)
    splits = {task: sets[r].for_training() for task, r in TASKS.items() if r in sets}
    prepared, _, _ = prepare_splits(spec.task, loaded, splits)
    data = {task: as_data(split, flag(TASKS[task])) for task, split in prepared.items()}
    for part in data.values():
        if part.num_samples is not None and part.num_samples < 2:
            raise ValueError(f"{part.name}: {part.num_samples} sample; curvature needs at least 2")
    any_data = next(iter(data.values()))
    classes = try_forward(loaded, any_data)
    networks = _networks(spec, loaded, any_data)
    if "source" in networks and "source" in sets:
        option = f"--source {spec.task.source}"
        notes += check_numbers(option, sets["source"], classes, names)
    print_notes(*loaded.notes, *notes)
    losses = []
    for task in TASKS:
        if task in networks and task in data:
            network = networks[task].to(device).eval()
            batches = list(_batches(spec, data[task], device))
            _check_classes(network, batches, data[task].name)
            name = getattr(spec.task, TASKS[task])
            losses.append(TaskLoss(name=task, model=network, batches=batches, data=name))
    if not losses:
        raise ValueError("no loss to look at: " + "; ".join(loaded.notes))
    return losses


def _networks(spec: CurvatureSpec, loaded: LoadedModel, data: Data) -> dict[str, nn.Module]:
    """The network of each task that the checkpoint has."""
    if not spec.checkpoint:
        return {"source": loaded.model}
    sample, _ = data.batch_at(torch.arange(2))
    saved = load_saved(spec.checkpoint, loaded.model, sample)
    if saved.source is not None:
        return {"source": saved.source, "target": saved.target}
    if spec.task.source:
        loaded.notes.append(f"the source loss is left out: {saved.note}")
    return {"target": saved.target}


def _batches(spec: CurvatureSpec, data: Data, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Samples of `data` drawn at random, in the order in which they are stored."""
    assert data.num_samples is not None, "data read by name have a length"
    order = torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(spec.seed))
    for index in order[: spec.samples].sort().values.split(spec.batch_size):
        x, y = data.batch_at(index)
        yield move(x, device), y.to(device)


def _check_classes(network: nn.Module, batches: list[tuple[Any, Tensor]], name: str) -> None:
    with evaluating(network):
        logits = forward_logits(network, batches[0][0])
    check_logits(logits)
    for _, y in batches:
        check_labels(y, logits.shape[1], name)
