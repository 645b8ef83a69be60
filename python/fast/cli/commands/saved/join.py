"""`fast join`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from fast.cli.job_file import replace_job
from fast.cli.notes import print_notes
from fast.cli.report.finetune import what_next
from fast.cli.report.table import percent
from fast.cli.spec import JoinSpec
from fast.cli.spec.base import shown
from fast.cli.task.load import LoadedTask, load_task, untrained_head
from fast.cli.task.run import check_replaceable, is_data_of, job_of
from fast.data.dataset import as_data
from fast.data.source_inputs import SourceInputs
from fast.data.trees import concatenate
from fast.deploy.load import check_result
from fast.errors import counted, first_line, printable
from fast.files import atomic_file, check_writable, read_json
from fast.heads import find_head
from fast.heads.find import classes_of
from fast.merge.join import LEAST, LIMIT, join_heads
from fast.merge.join_parts import saved_heads
from fast.merge.joined import Joined
from fast.models.preparation import read_preparation
from fast.models.saved import DATA_FILE, JOIN_FILE, RESULT_FILE
from fast.train.config import TrainConfig


def run(spec: JoinSpec) -> int:
    folder = Path(spec.output)
    check_writable(folder, "--output")
    if folder.resolve() == Path(spec.run).resolve():
        raise ValueError(f"--output {folder}: is the run itself; name another folder")
    check_replaceable(folder, own=(folder / JOIN_FILE).is_file())
    check_result(Path(spec.run))
    task = load_task(spec.task, measured=False)
    of_run, read = job_of(Path(spec.run)).get("data"), task.description["data"]
    if of_run:
        is_data_of(Path(spec.run), of_run, read["name"], read["samples_hash"])
    if head := untrained_head(task.loaded, task.train, TrainConfig()):
        raise ValueError(
            f"RUN {spec.run}: the head of the old classes, {printable(head)}, is not in the "
            "checkpoint of the network, and answers by chance: there is nothing to join"
        )
    sample, _ = as_data(task.train, "data").batch_at(torch.arange(2))
    count = classes_of(find_head(task.loaded.model, sample).module)
    heads = saved_heads(spec.run, task.loaded.model, sample)
    source = SourceInputs.parse(task.source_inputs, LIMIT, "source_inputs")
    if spec.source_labelled and source.labels is None:
        raise ValueError(
            f"--source-labelled: --source-inputs {spec.task.source_inputs} has no labels that can "
            "be used; drop the option, and the network's own answers take their place"
        )
    if not spec.source_labelled:
        source = source.without_labels()
    joined = join_heads(
        heads, source, _target_samples(task), _source_classes(spec, count), task.classes
    )
    _save(joined, spec, folder)
    print(_summary(joined))
    print(f"saved in {printable(folder)}\n{what_next(folder)}")
    return 0


def _target_samples(task: LoadedTask) -> Any:
    """The samples that the run held out; if they are few, also those that it trained on."""
    held_out = task.sizes.get("val", 0)
    if held_out >= LEAST:
        return task.val
    print_notes(
        f"the run held out {held_out} samples, and joining takes at least {LEAST}: samples that it "
        "trained on are used, too. Its head is surer of these than of others, so that new inputs "
        "may be taken for old classes too often; a larger --val-fraction of the run avoids it"
    )
    parts = [
        as_data(part, "data").batch_at(torch.arange(min(task.sizes[name], LIMIT)))
        for name, part in (("val", task.val), ("train", task.train))
        if part is not None
    ]
    return concatenate([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _save(joined: Joined, spec: JoinSpec, folder: Path) -> None:
    """Write the joined network, with the facts of the run that still hold."""
    run = Path(spec.run)
    replace_job(folder, shown(spec.task))
    read_preparation(run).save(folder)
    if (run / DATA_FILE).is_file():
        with atomic_file(folder / DATA_FILE) as path:
            shutil.copyfile(run / DATA_FILE, path)
    joined.save(folder, {"network": read_json(run / RESULT_FILE).get("network")})


def _source_classes(spec: JoinSpec, count: int) -> list[str] | None:
    """The names in --source-classes, or else those that the run has saved.

    Raises:
        ValueError: the file cannot be read, or has another number of lines.
    """
    if spec.source_classes is None:
        network = read_json(Path(spec.run) / RESULT_FILE).get("network") or {}
        return network.get("source_classes")
    option = f"--source-classes {spec.source_classes}"
    try:
        text = Path(spec.source_classes).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: cannot be read ({first_line(error)})") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != count:
        there = counted(len(names), "name")
        raise ValueError(f"{option}: has {there}; the old head has {count} classes")
    return names


def _summary(joined: Joined) -> str:
    calibration = joined.calibration
    assert calibration is not None
    merged = len(set(joined.classes_of("source")) & set(joined.classes_of("target")))
    return (
        f"{len(joined.classes)} classes in one softmax"
        + (f", of which {merged} are of both tasks" if merged else "")
        + f"; {joined.passes} forward pass{'es' if joined.passes > 1 else ''} per input"
        + f"\n{percent(calibration.mistaken)} % of held-out samples are taken for the other task; "
        f"loss over all classes {calibration.loss_before:.3f} -> {calibration.loss:.3f} nats"
    )
