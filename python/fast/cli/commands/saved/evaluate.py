"""`fast evaluate`."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from fast.cli.folders import with_numbers
from fast.cli.job_file import is_gone
from fast.cli.notes import print_notes
from fast.cli.options import flag
from fast.cli.report.evaluation import (
    CLASS_HEADER,
    LISTED,
    class_rows,
    numbers,
    verdict,
    write_evaluation,
)
from fast.cli.report.machine import describe
from fast.cli.report.table import paragraph, text_table
from fast.cli.spec import EvaluateSpec
from fast.cli.spec.task import TaskSpec
from fast.cli.task.run import (
    is_data_of,
    job_of,
    open_run,
    own_columns,
    print_left_out,
    same_place,
)
from fast.data.sources import DataWarning, NamedData, load_data
from fast.data.sources.files import samples_hash, shared_samples
from fast.deploy.figures import evaluation_figure
from fast.deploy.words import Task
from fast.errors import counted, printable
from fast.figures import save
from fast.files import check_writable, read_json, write_json

NUMBERS = "evaluation.json"


def run(spec: EvaluateSpec) -> int:
    predictor = open_run(spec)
    task = predictor.task_of(spec.task)
    name, data, skip_broken = _data(spec, task)
    own = with_numbers(Path(spec.run) / f"evaluation-{task}")
    free = next(folder for folder in own if _is_free(folder, data.samples_hash))
    folder = Path(spec.output) if spec.output else free
    check_writable(folder, "--output")
    evaluation = predictor.evaluate(data, task=task, skip_broken=skip_broken)
    print_left_out(evaluation.unreadable)
    print(paragraph(f"{printable(name)}: {verdict(evaluation)}") + "\n")
    rows = class_rows(evaluation)
    print(text_table(CLASS_HEADER, rows[:LISTED]))
    if len(rows) > LISTED:
        print(f"... and {counted(len(rows) - LISTED, 'class', 'classes')} recognised better")

    figure = save(evaluation_figure(evaluation), folder / "confusion.png")
    what = {"data": name, "samples_hash": data.samples_hash}
    write_json(folder / NUMBERS, what | numbers(evaluation))
    facts = {"run": spec.run, "data": name, "task": task, **describe()}
    write_evaluation(
        folder / "report.html",
        title=f"{predictor.name or type(predictor.model).__name__} on {name}",
        evaluation=evaluation,
        figure=figure.read_bytes(),
        worst=spec.worst,
        facts=facts,
    )
    print(f"\n{printable(folder)}: report.html, confusion.png, {NUMBERS}")
    return 0


def _is_free(folder: Path, samples_hash: str) -> bool:
    """Whether a folder has no evaluation, or one of these samples."""
    file = folder / NUMBERS
    return not file.is_file() or read_json(file).get("samples_hash") == samples_hash


def _data(spec: EvaluateSpec, task: Task) -> tuple[str, Any, bool]:
    """The name and contents of DATA, or of what the run held out; and whether --skip-broken was
    given, here or to the run, so that files that cannot be read are left out.

    Raises:
        FileNotFoundError, ValueError: see `_name`, `_labelled` and `is_data_of`.
    """
    job = job_of(Path(spec.run))
    role = "source" if task == "source" else "data"
    of_run = job.get(role)
    name = _name(spec, role, of_run)
    in_place = of_run is not None and same_place(name, of_run)
    of_job = job if in_place else own_columns(job, [name])
    columns = {
        option: getattr(spec, option) or of_job.get(option)
        for option in ("input_column", "label_column")
    }
    data = _labelled(spec.run, name, numeric_labels=task == "source", **columns)
    for note in data.notes:
        print_notes(f"{name}: {note}")
    data = dataclasses.replace(data, samples_hash=samples_hash(data))
    own = in_place
    if role == "data" and of_run is not None:
        fraction = float(job.get("val_fraction", TaskSpec.val_fraction))
        own = is_data_of(Path(spec.run), of_run, name, data.samples_hash)
        if own:
            data = data.with_val(fraction)
            if data.val is None:
                print_notes("these are the samples that the run was trained on")
            else:
                name = f"{name} ({data.held_out or 'held out'})"
        elif shared := _shared(job, of_run, data):
            print_notes(f"{name}: {shared}; what the run was trained on it answers too well")
    skip_broken = spec.skip_broken or (own and bool(job.get("skip_broken")))
    return name, dataclasses.replace(data, name=name), skip_broken


def _labelled(run: str, name: str, **options: Any) -> NamedData:
    """Read data that have labels.

    Raises:
        ValueError: they have none, or cannot be used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        try:  # a folder of one class looks like one of unlabelled samples
            data = load_data(name, **options)
        except ValueError:
            data = load_data(name, **options, unlabelled=True)
    if not data.has_labels:
        raise ValueError(
            f"{name}: has no labels to compare with, which are the names of class folders, or a "
            f"column (--label-column). fast predict {run} {name} says what the run takes it for"
        )
    return data


def _shared(job: dict[str, Any], of_run: str, data: NamedData) -> str:
    """A note on samples that are in the training split of the run's data, too; or nothing."""
    if not Path(of_run).expanduser().exists():
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        try:
            own = load_data(
                of_run,
                input_column=job.get("input_column"),
                label_column=job.get("label_column"),
            )
        except (OSError, ValueError):  # they have changed, and only a note would come of them
            return ""
    return "" if own.train is None else shared_samples(own.train, data.for_evaluation(), of_run)


def _name(spec: EvaluateSpec, role: str, of_run: str | None) -> str:
    """The name of DATA, or of the data of the run.

    Args:
        role: the option that named the run's data.
        of_run: what it named.

    Raises:
        ValueError: there is no name.
        FileNotFoundError: the data of the run have moved.
    """
    if spec.data:
        return spec.data
    if of_run is None:
        raise ValueError(
            f"DATA must be given: the run in {spec.run} names no {flag(role)} to evaluate on"
        )
    if is_gone(of_run):
        raise FileNotFoundError(
            f"RUN {spec.run}: its {flag(role)} {printable(of_run)} is not there any more: name it "
            f"where it is now, fast evaluate {printable(spec.run)} DATA"
        )
    return of_run
