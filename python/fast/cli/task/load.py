"""Read and prepare a network and its data, as `fast.finetune` takes them."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import fast
from fast.adapt.plan import Plan
from fast.cli.notes import print_notes
from fast.cli.options import flag
from fast.cli.report.data import gaps, image_facts, lines
from fast.cli.spec.task import TaskSpec
from fast.cli.task.checks import (
    check_numbers,
    check_shapes,
    check_target,
    largest_label,
    unclear_names,
)
from fast.cli.task.data import (
    PARTS,
    numbered_as_in_head,
    read_data,
    same_samples,
    source_samples,
    splits_of,
)
from fast.cli.task.prepare import (
    labels_of,
    load_network,
    prepare_splits,
    random_flip,
    try_forward,
)
from fast.data.dataset import as_data
from fast.data.images.pixels import PreparedImages
from fast.data.sources import FileReport, NamedData, Split
from fast.data.trees import pick
from fast.errors import counted, printable
from fast.heads import find_head
from fast.heads.find import Head
from fast.models.loaded import LoadedModel
from fast.models.preparation import Preparation
from fast.models.saved.description import own_classes
from fast.train.config import TrainConfig
from fast.train.finetune import plan


@dataclass(kw_only=True)
class LoadedTask:
    """One network and its data, prepared.

    Attributes:
        name: network and data in a word each.
        train, val, source, source_inputs: `(x, y)` tensors or Datasets; val is None where all
            samples are trained on.
        sizes: the number of samples of each of these.
        card: the file of a source card.
        source_skill: replaces `auto`, because the network's own head was never trained.
        preparation: how pictures, texts and sounds were prepared.
        description: classes, their samples and the preprocessing, as plain values.
    """

    name: str
    loaded: LoadedModel
    classes: tuple[str, ...]
    train: Any
    val: Any = None
    source: Any = None
    source_inputs: Any = None
    card: str | None = None
    source_skill: str | None = None
    transform: Any = None
    preparation: Preparation = field(default_factory=Preparation)
    sizes: dict[str, int] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `fast.finetune`."""
        names = ("train", "val", "source", "source_inputs", "card", "transform")
        return {name: getattr(self, name) for name in names} | {"num_classes": len(self.classes)}

    def options(self, config: TrainConfig) -> dict[str, Any]:
        """The options of `fast.finetune`."""
        skill = self.source_skill or config.source_skill
        return dataclasses.asdict(config) | {"source_skill": skill}

    def adapt(self, config: TrainConfig, **replaced: Any) -> fast.Result:
        """`fast.finetune` a copy of the network; `replaced` takes the place of arguments."""
        model = copy.deepcopy(self.loaded.model)
        return fast.finetune(model, **(self.arguments | replaced), **self.options(config))

    def fold(self, rows: np.ndarray) -> LoadedTask:
        """The same task, with these training samples held out."""
        rest = np.setdiff1d(np.arange(self.sizes["train"]), rows)
        return dataclasses.replace(
            self,
            train=_subset(self.train, rest),
            val=_subset(self.train, rows, augment=False),
            sizes=self.sizes | {"train": len(rest), "val": len(rows)},
        )

    def head(self, config: TrainConfig) -> Head:
        """The layer that makes the logits of the network."""
        return _head(self.loaded, self.train, config)

    def plan(self, config: TrainConfig) -> Plan:
        """What `adapt` would do; the network is left as it is."""
        data = self.arguments | {"source": None}  # a run only measures the source
        options = dataclasses.replace(config, output=None, resume=None)
        return plan(self.loaded.model, **data, **self.options(options))


def _subset(prepared: Any, rows: np.ndarray, augment: bool = True) -> Any:
    if isinstance(prepared, PreparedImages):
        return prepared.subset(rows, augment=augment)
    index = torch.from_numpy(rows)
    return tuple(pick(part, index) for part in prepared)


def _head(loaded: LoadedModel, train: Any, config: TrainConfig) -> Head:
    sample, _ = as_data(train, "data").batch_at(torch.arange(2))
    return find_head(loaded.model, sample, config.head_name)


def load_task(
    spec: TaskSpec, config: TrainConfig | None = None, *, measured: bool = True
) -> LoadedTask:
    """Read network and data, and print what they are.

    Args:
        config: the options of the run.
        measured: refuse data that have no held-out samples.

    Raises:
        ValueError, FileNotFoundError, ImportError: the network or the data cannot be used; the
            message says why.
    """
    config = config or TrainConfig()
    keeps_head = config.keeps_head
    print(f"reading {printable(spec.data)} and {printable(spec.model)}", flush=True)
    sets, notes = read_data(spec)
    check_target(spec, sets["data"], measured)
    loaded = load_network(spec)
    names = own_classes(loaded.model, spec.model, spec.weights)
    of_head = [role for role in sets if role != "data" or keeps_head]
    sets |= {role: numbered_as_in_head(sets[role], names) for role in of_head}
    splits = splits_of(sets)
    prepared, preparation, reports = prepare_splits(
        spec, loaded, splits, config.num_workers, config.progress
    )
    check_shapes(spec, splits, prepared)
    classes = try_forward(loaded, prepared["train"])
    untrained = untrained_head(loaded, prepared["train"], config)
    skill = _skill(spec, loaded, untrained, config)
    notes += _check_source(spec, sets, classes, names, skill or config.source_skill)
    target = sets["data"]
    if keeps_head:
        notes += check_numbers(f"--data {spec.data}", target, classes, names)
        more = map(str, range(len(target.classes), classes))
        target = dataclasses.replace(target, classes=(*target.classes, *more))
    report = FileReport.merged(reports[part] for part in PARTS if part in reports)
    description = _description(spec, loaded, target, prepared, preparation, report)
    sizes = {name: len(labels_of(split)) for name, split in prepared.items()}
    if "source_inputs" in sets:
        samples = source_samples(sets["source_inputs"], prepared["source_inputs"])
        prepared["source_inputs"] = samples
    loaded.notes += notes + [
        f"--data {spec.data}: {note}" for note in gaps(description["data"], spec.folds)
    ]
    print(lines(**description))
    print_notes(*loaded.notes)
    return LoadedTask(
        name=spec.short_name,
        loaded=loaded,
        classes=target.classes,
        **prepared,
        card=spec.card,
        source_skill=skill,
        transform=random_flip if spec.flip else None,
        preparation=preparation,
        sizes=sizes,
        description=description | {"notes": loaded.notes, "untrained_head": untrained},
    )


def untrained_head(loaded: LoadedModel, train: Any, config: TrainConfig) -> str | None:
    """The name of the network's own head, if its checkpoint lacks it; else None."""
    if not loaded.missing:
        return None
    head = _head(loaded, train, config).name
    return head if f"{head}.weight" in loaded.missing else None


def _skill(
    spec: TaskSpec, loaded: LoadedModel, head: str | None, config: TrainConfig
) -> str | None:
    """The source skill of a network whose own head was never trained; None leaves the option.

    Args:
        head: see `untrained_head`.

    Raises:
        ValueError: the answers of such a head are to be measured.
    """
    if head is None:
        return None
    what = f"the network's own head, {printable(head)}, is not in its checkpoint, and answers by "
    if spec.source:
        raise ValueError(
            f"--source {spec.source}: {what}chance: drop the option; --source-inputs keeps and "
            "measures the features"
        )
    if not spec.source_inputs or config.source_skill != TrainConfig.source_skill:
        return None
    loaded.notes.append(f"{what}chance: what is kept and measured of the source is its features")
    return "features"


def _description(
    spec: TaskSpec,
    loaded: LoadedModel,
    target: NamedData,
    prepared: dict[str, Any],
    preparation: Preparation,
    report: FileReport,
) -> dict[str, Any]:
    """The target's data as they were read, and how they were prepared."""
    images = sounds = texts = None
    if preparation.images is not None:
        images = image_facts(spec, preparation.images, loaded.preprocessing, report)
        images["in_memory"] = not isinstance(prepared["train"], PreparedImages)
    if preparation.sounds is not None:
        skipped = list(report.broken)
        sounds = preparation.sounds.facts() | {"skipped": skipped, "cut": report.cut}
    if preparation.kind == "texts":
        texts = {"max_length": preparation.max_length, "cut": report.cut}
    labels = {part: labels_of(prepared[part]) for part in PARTS if part in prepared}
    splits = {part: Split(inputs=None, labels=rows) for part, rows in labels.items()}
    data = dataclasses.replace(target, splits=splits).description
    return {"data": data, "images": images, "sounds": sounds, "texts": texts}


def _check_source(
    spec: TaskSpec,
    sets: dict[str, NamedData],
    classes: int,
    names: list[str] | None,
    skill: str,
) -> list[str]:
    """Refuse labels of the source task that the network's head does not have.

    Source inputs need no labels: labels that cannot be matched with the head's are not used.

    Args:
        classes, names: of the network's own head.

    Returns:
        notes on the source and the source inputs.
    """
    notes: list[str] = []
    option = f"{flag('source_inputs')} {spec.source_inputs}"
    if "source" in sets:
        if "source_inputs" in sets and same_samples(sets["source"], sets["source_inputs"]):
            notes.append(
                f"{option}: the same samples as --source: what is kept is measured on what it is "
                "kept with, and looks better than it is; name others"
            )
        notes += check_numbers(f"--source {spec.source}", sets["source"], classes, names)
    if "source_inputs" not in sets or skill == "features":
        return notes
    samples = sets["source_inputs"]
    if not samples.has_labels:
        count = counted(len(samples.for_training()), "sample")
        return [*notes, f"{option}: {count} without labels"]
    if unclear := unclear_names(samples, classes, names, more=True):
        sets["source_inputs"] = dataclasses.replace(samples, has_labels=False)
        return [*notes, f"{option}: {unclear}, and the labels are not used"]
    notes += check_numbers(option, samples, classes, names, more=True)
    top = largest_label(samples)
    if top >= classes and skill == "auto":
        notes.append(
            f"{option}: label {top}, and the network's own head has {classes} classes: what is "
            "forgotten is measured by its features, not by its answers (--source-skill)"
        )
    return notes
