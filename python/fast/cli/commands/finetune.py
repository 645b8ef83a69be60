"""`fast finetune`."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

import fast
from fast.cli.folds import cross_validate
from fast.cli.job_file import JOB_FILE, absolute, write_job
from fast.cli.notes import print_notes
from fast.cli.report.finetune import plan_table, summary, what_next
from fast.cli.spec import FinetuneSpec
from fast.cli.spec.base import shown
from fast.cli.task.load import LoadedTask, load_task
from fast.errors import printable
from fast.files import check_writable, missing_folders, remove_empty
from fast.models.device import pick_device
from fast.models.saved import MANIFEST_FILE, list_checkpoints
from fast.ranks import Ranks, joined
from fast.train.config import TrainConfig
from fast.train.finite import Diverged, diverged
from fast.train.resume.run_folder import is_going_on


def run(spec: FinetuneSpec) -> int:
    with ExitStack() as stack:
        ranks = stack.enter_context(joined())
        if not ranks.first:  # only the first process prints
            stack.enter_context(ranks.quiet())
            stack.enter_context(redirect_stdout(None))
        return _run(spec, ranks)


def _run(spec: FinetuneSpec, ranks: Ranks) -> int:
    config, resumed = spec.training, None
    with ranks.together():
        pick_device(config.device)
        if config.resume:
            resumed = Path(config.resume)
            config = _continued(config, resumed)
        elif config.output and not spec.plan:
            _check_new(Path(config.output))
        task = load_task(
            spec.task,
            source_skill=config.source_skill,
            keeps_head=config.keeps_head,
            measured=False,
            workers=config.num_workers,
            progress=config.progress,
        )
    if spec.plan:
        plan = task.plan(config)
        print(f"{plan}\n\n{plan_table(plan, task.head(config))}")
        return 0
    if spec.task.folds:
        cross_validate(spec, task)
        return 0
    start = time.monotonic()
    with _folder(spec, resumed, ranks) as folder:
        options = dataclasses.asdict(dataclasses.replace(config, output=str(folder)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Diverged)  # an error here, when all is saved
            result = fast.finetune(task.loaded.model, **task.arguments, **options)
    seconds = time.monotonic() - start
    _describe(result, spec, task)
    with ranks.together():
        if ranks.first:
            result.save(folder)
    print(summary(task, result, seconds))
    print(f"saved in {printable(folder)}\n{what_next(folder)}")
    message = diverged(result.history[-1]["loss"], len(task.classes))
    if message:
        raise FloatingPointError(message)
    return 0


@contextmanager
def _folder(spec: FinetuneSpec, resumed: Path | None, ranks: Ranks) -> Iterator[Path]:
    """The folder of the run, a new one or that of `resumed`, on every process."""
    with ExitStack() as stack:
        folder = resumed or Path()
        with ranks.together():
            if ranks.first:
                going_on = _going_on(resumed) if resumed is not None else _claimed(spec)
                folder = stack.enter_context(going_on)
        yield ranks.from_first(folder)


def _describe(result: fast.Result, spec: FinetuneSpec, task: LoadedTask) -> None:
    """Tell the result what the command line knows about network and data."""
    result.classes = list(task.classes)
    result.data = task.description
    if result.by_class is not None:
        right, samples = result.by_class
        result.data["accuracy_by_class"] = {"right": right, "samples": samples}
    result.network = absolute(spec.task.model)
    result.preparation = task.preparation


def _continued(config: TrainConfig, folder: Path) -> TrainConfig:
    """The options of a run that goes on in `folder`, or starts again if it has no checkpoint."""
    if list_checkpoints(folder) or (folder / MANIFEST_FILE).exists():
        return config
    print_notes(f"{folder} has no checkpoint yet: the run starts from the beginning")
    return dataclasses.replace(config, resume=None)


def _check_new(folder: Path) -> None:
    check_writable(folder, "--output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if is_going_on(folder):
        raise ValueError(f"--output {folder}: another run is going on there; name another")
    begun = (folder / JOB_FILE).is_file() and not (folder / MANIFEST_FILE).exists()
    if begun and not list_checkpoints(folder):
        raise ValueError(
            f"--output {folder}: its run was stopped before its first checkpoint; fast finetune "
            f"--resume {folder} starts it from the beginning"
        )
    raise ValueError(f"--output {folder}: exists; name another, or go on with --resume {folder}")


def _claim(spec: FinetuneSpec) -> Path:
    """Make the folder of a new run, with its job file: --output, or else a new one under runs/.

    Runs that start at the same time may want the same folder. It belongs to the one that makes it,
    or makes the job file in it.
    """
    if spec.training.output:
        folder = Path(spec.training.output)
        _check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_job(folder, shown(spec))
        except FileExistsError as error:
            raise ValueError(
                f"--output {folder}: another run has just started there; name another"
            ) from error
        return folder
    base = Path("runs") / f"{spec.task.short_name}-{spec.training.method}"
    folder, n = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            n += 1
            folder = base.with_name(f"{base.name}-{n}")
        else:
            write_job(folder, shown(spec))
            return folder


@contextmanager
def _claimed(spec: FinetuneSpec) -> Iterator[Path]:
    """The folder of a new run. A run that ends before its first checkpoint leaves nothing behind,
    so that the next one may have its folder."""
    output = spec.training.output
    new = missing_folders(Path(output or "runs"))
    folder = _claim(spec)
    if folder not in new and not output:
        new.insert(0, folder)
    try:
        with _going_on(folder):
            yield folder
    except BaseException:
        if not list_checkpoints(folder):
            (folder / JOB_FILE).unlink(missing_ok=True)
            remove_empty(new)
        raise


@contextmanager
def _going_on(folder: Path) -> Iterator[Path]:
    """The folder of a run. If the run is interrupted, print how to go on with it."""
    try:
        yield folder
    except KeyboardInterrupt:
        if list_checkpoints(folder):
            print(f"\nto go on: fast finetune --resume {printable(folder)}", file=sys.stderr)
        raise
