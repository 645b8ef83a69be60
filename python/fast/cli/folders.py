"""The folder of a run of `fast finetune`, which is a new one, or that of a run that goes on."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fast.cli.job_file import write_job
from fast.cli.notes import print_notes
from fast.cli.spec import FinetuneSpec
from fast.cli.spec.base import shown
from fast.errors import printable
from fast.files import JOB_FILE, check_writable, missing_folders, remove_empty
from fast.models.saved import MANIFEST_FILE, is_going_on, list_checkpoints
from fast.ranks import Ranks
from fast.train.config import TrainConfig


@contextmanager
def run_folder(spec: FinetuneSpec, resumed: Path | None, ranks: Ranks) -> Iterator[Path]:
    """The folder of the run, a new one or that of `resumed`, on every process."""
    with ExitStack() as stack:
        folder = resumed or Path()
        with ranks.together():
            if ranks.first:
                going_on = _going_on(resumed) if resumed is not None else _claimed(spec)
                folder = stack.enter_context(going_on)
        yield ranks.from_first(folder)


def continued(config: TrainConfig, folder: Path) -> TrainConfig:
    """The options of a run that goes on in `folder`, or starts again if it has no checkpoint."""
    if (folder / MANIFEST_FILE).exists():
        print_notes(f"{folder}: its run is finished: nothing is trained, and this is its result")
        return config
    if list_checkpoints(folder):
        return config
    print_notes(f"{folder} has no checkpoint yet: the run starts from the beginning")
    return dataclasses.replace(config, resume=None)


def with_numbers(base: Path) -> Iterator[Path]:
    """`base`, `base-2`, `base-3`, ..."""
    yield base
    for n in itertools.count(2):
        yield base.with_name(f"{base.name}-{n}")


def check_new(folder: Path) -> None:
    """Raise ValueError where a new run cannot have this folder."""
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
        check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_job(folder, shown(spec))
        except FileExistsError as error:
            raise ValueError(
                f"--output {folder}: another run has just started there; name another"
            ) from error
        return folder
    for folder in with_numbers(Path("runs") / f"{spec.task.short_name}-{spec.training.method}"):
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
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
