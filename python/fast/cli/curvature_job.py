"""From the options of `fast curvature` to networks with their batches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast.cli.job import check_kinds, data_columns, held_out, read_data, tell, try_forward
from fast.cli.prepare import broken_images, image_format, prepare
from fast.data.dataset import Data, as_data
from fast.data.images.pixels import ImageReport
from fast.data.labels import check_labels
from fast.data.sources import Split
from fast.data.trees import move
from fast.models.load import LoadedModel, load_model
from fast.models.saved import load_saved
from fast.train.device import pick_device


@dataclass
class LossOf:
    """A task's loss: the network that answers it, and batches (inputs, labels) of its data."""

    name: str
    model: nn.Module
    batches: list[tuple[Any, Tensor]]
    data: str

    @property
    def samples(self) -> int:
        return sum(len(y) for _, y in self.batches)


def losses_of(args: argparse.Namespace) -> list[LossOf]:
    """Source and target loss, as far as there are data for them; the networks in eval mode."""
    device = pick_device(args.device)
    columns = data_columns(args)
    splits: dict[str, Split] = {}
    notes: list[str] = []
    if args.source:
        source = read_data("source", args.source, notes, **columns, numeric_labels=True)
        splits["source"] = _training_split(source)
    if args.data:
        target = held_out(args, read_data("data", args.data, notes, **columns))
        splits["target"] = _training_split(target)

    loaded = load_model(
        args.model,
        args.weights,
        allow_missing=args.allow_missing,
        pretrained=not args.checkpoint,
    )
    check_kinds(args, splits)
    form = image_format(args, loaded, splits)
    report = ImageReport()
    data = {
        name: as_data(prepare(split, loaded, form, args.max_length, report), f"--{_flag(name)}")
        for name, split in splits.items()
    }
    notes += broken_images(args, report)
    for name, part in data.items():
        if part.num_samples is not None and part.num_samples < 2:
            raise ValueError(
                f"--{_flag(name)}: {part.num_samples} sample; curvature needs at least 2"
            )
    networks = _networks(args, loaded, next(iter(data.values())))
    tell([*loaded.notes, *notes])
    found = []
    for name, network in networks.items():
        if name in data:
            batches = list(_batches(args, data[name], device))
            network = network.to(device).eval()
            _check_classes(network, batches, f"--{_flag(name)}")
            found.append(LossOf(name, network, batches, getattr(args, _flag(name))))
    if not found:
        raise ValueError("no loss to look at: " + "; ".join(loaded.notes))
    return found


def _flag(name: str) -> str:
    return {"target": "data"}.get(name, name)


def _training_split(data: Any) -> Split:
    return data.train if data.train is not None else data.for_evaluation()


def _networks(args: argparse.Namespace, loaded: LoadedModel, data: Data) -> dict[str, nn.Module]:
    try_forward(loaded, data)
    if not args.checkpoint:
        return {"source": loaded.model}
    sample, _ = data.batch_at(torch.arange(2))
    saved = load_saved(args.checkpoint, loaded.model, sample)
    networks = {"target": saved.target}
    if saved.source is not None:
        networks = {"source": saved.source, **networks}
    elif args.source:
        loaded.notes.append(f"the source loss is left out: {saved.note}")
    return networks


def _batches(
    args: argparse.Namespace, data: Data, device: torch.device
) -> Iterator[tuple[Any, Tensor]]:
    count = data.num_samples
    assert count is not None, "data read by name have a length"
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
    for index in chosen[: args.samples].sort().values.split(args.batch_size):
        x, y = data.batch_at(index)
        yield move(x, device), y.to(device)


def _check_classes(network: nn.Module, batches: list[tuple[Any, Tensor]], name: str) -> None:
    from fast.heads import evaluating, forward_logits

    with evaluating(network):
        classes = forward_logits(network, batches[0][0]).shape[1]
    for _, y in batches:
        check_labels(y, classes, name)
