"""Read and check the data of a run, before anything is computed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fast.adapt.setup import num_outputs
from fast.data.dataset import Data, as_data
from fast.data.labels import check_labels
from fast.data.stream import first_inputs
from fast.data.transform import Transform, check_mixed
from fast.data.trees import leaves
from fast.errors import counted, warn
from fast.heads.forward import check_mirrored
from fast.train.config import TrainConfig
from fast.train.measure import Evaluator

log = logging.getLogger("fast")

KEY_VALUES = 64  # of a sample, by which samples that may be the same are found


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What `fast.finetune` trains on and measures.

    Attributes:
        train: training data.
        val: validation data of the target task, or None.
        source: data of the source task, or a function of the network; or None.
        transform: applied to training batches; or None.
        num_classes: C, the classes of the target.
        roots: the objects as the user gave them, by argument name.
    """

    train: Data
    val: Data | None
    source: Data | Evaluator | None
    transform: Transform | None
    num_classes: int
    roots: dict[str, Any]


def read_data(
    config: TrainConfig,
    model: nn.Module,
    train: Any,
    val: Any,
    source: Any,
    transform: Transform | None,
    num_classes: int | None,
) -> RunData:
    """Wrap and check the data that `fast.finetune` was given.

    Raises:
        ValueError, TypeError: they do not fit; the message names the argument.
    """
    train_data = read_one(train, "train", config)
    train_data.check_trainable()
    val_data = None if val is None else read_one(val, "val", config)
    source_data: Data | Evaluator | None = source
    if source is not None and not callable(source):
        source_data = read_one(source, "source", config)
    classes = num_outputs(config, model, train_data, num_classes)
    for data in (train_data, val_data):
        if data is not None and data.labels is not None:
            check_labels(data.labels, classes, data.name)
    if config.patience is not None and val is None:
        raise ValueError("patience needs val: early stopping watches the validation accuracy")
    if config.tta and val_data is not None:
        check_mirrored(first_inputs(val_data), val_data.name)
    if config.mixup or config.cutmix:
        check_mixed(first_inputs(train_data))
    _warn_of_unused(config, train_data, val_data, source_data)
    return RunData(
        train=train_data,
        val=val_data,
        source=source_data,
        transform=transform,
        num_classes=classes,
        roots={"train": train, "val": val, "source": source, "transform": transform},
    )


def read_one(data: Any, name: str, config: TrainConfig) -> Data:
    """`as_data`, with as many worker processes as the options, or else the data set, ask for."""
    read = as_data(data, name)
    if read.dataset is None:
        return read
    workers = config.num_workers
    if workers is None:
        workers = getattr(read.dataset, "workers", 0)
    return replace(read, workers=workers, pinned=torch.cuda.is_available())


def note_shared_samples(data: RunData) -> None:
    """Say how many samples are measured that are trained on, where both are in memory."""
    if data.val is not None and (shared := _shared_samples(data.train, data.val)):
        log.info(
            "val: %d of %s are in train, too: what is measured of them is not held out",
            shared,
            counted(len(data.val.labels) if data.val.labels is not None else shared, "sample"),
        )


def _shared_samples(train: Data, val: Data) -> int:
    """How many samples of `val` have inputs that `train` has, too."""
    if train.inputs is None or val.inputs is None:
        return 0
    ours, theirs = leaves(train.inputs), leaves(val.inputs)
    if [(x.shape[1:], x.dtype) for x in ours] != [(x.shape[1:], x.dtype) for x in theirs]:
        return 0
    first: dict[bytes, int] = {}
    for row, key in enumerate(_keys(ours)):
        first.setdefault(key, row)
    pairs = [(first[key], row) for row, key in enumerate(_keys(theirs)) if key in first]
    return sum(
        all(torch.equal(x[i], y[j].to(x.device)) for x, y in zip(ours, theirs, strict=True))
        for i, j in pairs
    )


def _keys(inputs: list[torch.Tensor]) -> list[bytes]:
    """For each sample some of its values, by which it is told from most others."""
    parts = []
    for x in inputs:
        flat = x.detach().flatten(1) if x.dim() > 1 else x.detach()[:, None]
        places = torch.linspace(0, flat.shape[1] - 1, min(KEY_VALUES, flat.shape[1])).long()
        few = flat[:, places.to(flat.device)].cpu().contiguous()
        parts.append(few.view(torch.uint8).numpy())
    return [b"".join(part[row].tobytes() for part in parts) for row in range(len(parts[0]))]


def _warn_of_unused(config: TrainConfig, *sets: Data | Evaluator | None) -> None:
    """Warn of options of the loop that nothing in this run uses."""
    if config.save_every is not None and not (config.output or config.resume):
        warn(f"save_every={config.save_every} is not used: nothing is saved without output=")
    if config.num_workers and not any(isinstance(x, Data) and x.dataset is not None for x in sets):
        warn(
            f"num_workers={config.num_workers} is not used: it is for a Dataset, of which samples "
            "are read as the run goes on"
        )
