"""Adapt a pretrained classifier to new data, and say what it still knows of the old.

  fast finetune --model timm:resnet18 --data photos/ --epochs 5
  fast finetune --model nets.py:ResNet(20) --weights resnet20.safetensors \\
      --data signs.npz --source cifar10.npz --steps 150
  fast finetune --resume runs/ResNet-signs-fast

The folder --output then holds model.safetensors (loads into the plain network), result.json,
history.jsonl, the options in config.json and job.json, classes and preprocessing in data.json, and
the last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fast.cli.options import (
    add_model_and_data,
    add_training,
    check_training,
    fill_defaults,
    mark_unset,
    require,
    training_options,
)
from fast.cli.record import JOB_FILE, read_record, write_record
from fast.cli.report.table import percent, text_table
from fast.errors import printable
from fast.files import check_writable

# With --resume everything else is as it was; the model may be named again, and is compared.
FREE_ON_RESUME = {"resume", "device", "progress", "model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_data(parser, protection=True)
    add_training(parser)
    mark_unset(parser)


def run(args: argparse.Namespace) -> int:
    given = fill_defaults(args)
    resumed = Path(args.resume) if "resume" in given else None
    if resumed is not None:
        _restore(args, resumed, given)
    else:
        require(args, "model", "data")
        if getattr(args, "output", None):
            _check_new(Path(args.output))

    check_training(args)
    _check_budget(args)

    from fast.cli.job import load_job

    job = load_job(args, measured=False)

    import fast
    from fast.train.finite import Diverged, diverged

    start = time.monotonic()
    with _going_on(resumed) if resumed is not None else _claimed(args) as folder:
        options = training_options(args) | {"output": str(folder)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Diverged)  # an error here, when all is saved
            result = fast.finetune(job.loaded.model, **job.data, **options)
    seconds = time.monotonic() - start
    result.classes = list(job.classes)
    result.data = job.description
    result.save(folder)
    print(_summary(job, result, seconds))
    print(f"saved in {printable(folder)}")
    message = diverged(result.history[-1]["loss"], len(job.classes))
    if message:
        raise FloatingPointError(message)
    return 0


def _check_budget(args: argparse.Namespace) -> None:
    """Raise ValueError where there is nothing to check a budget on, before data are read."""
    from fast.adapt.config import Budget

    option = getattr(args, "forget_budget", None)
    if option is None or args.source_inputs:
        return
    if not args.card or Budget.parse(option).points:
        raise ValueError(
            "--forget-budget needs --source-inputs to check on, or (for nats) a --card to forecast "
            "by"
        )


def _summary(job: Any, result: Any, seconds: float) -> str:
    config, final = result.config, result.final
    rows = []
    if job.val is not None:
        rows.append(["target", "", percent(result.target_accuracy), str(job.sizes["val"])])
    if job.source is not None:
        before, after = result.source_accuracy_before, result.source_accuracy
        rows.append(["source", percent(before), percent(after), str(job.sizes["source"])])
    budget = _budget_line(job, config.forget_budget, final["forecast"])
    steps = result.history[-1]["step"]
    kept = "" if final["step"] == steps else f", kept the best, of step {final['step']}"
    if not final["step"]:
        kept = ", kept the head start: training made the validation accuracy worse"
    plan = result.plan
    size = f"{plan.target_size} + {plan.source_size}" if plan.source_size else plan.target_size
    table = text_table(["accuracy, %", "before", "after", "samples"], rows) if rows else ""
    return (
        f"{printable(job.name)}: {config.method}, {steps} steps of {size}, "
        f"lr {result.lr:g}, {seconds:.0f} s{kept}\n\n{table}\n{budget}"
    )


def _budget_line(job: Any, option: str | float | None, lost: float | None) -> str:
    """What was allowed to be forgotten, and what was measured, or forecast, at the end."""
    if option is None or lost is None:
        return ""
    from fast.adapt.config import Budget

    budget = Budget.parse(option)
    shown = f"{100 * lost:.2g} %" if budget.points else f"{lost:.2g} nats"
    how = (
        "forecast by the card: there were no source inputs to check on"
        if job.source_inputs is None
        else "measured on held-back source inputs"
    )
    return f"forget budget {budget}: {shown} lost at the end, {how}\n"


def _check_new(folder: Path) -> None:
    check_writable(folder, "--output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    from fast.models.saved import MANIFEST_FILE
    from fast.train.resume.checkpoint import list_checkpoints
    from fast.train.resume.run_folder import is_going_on

    if is_going_on(folder):
        raise ValueError(f"--output {folder}: another run is going on there; name another")
    begun = (folder / JOB_FILE).is_file() and not (folder / MANIFEST_FILE).exists()
    if begun and not list_checkpoints(folder):
        raise ValueError(
            f"--output {folder}: its run was stopped before its first checkpoint; fast finetune "
            f"--resume {folder} starts it from the beginning"
        )
    raise ValueError(f"--output {folder}: exists; name another, or go on with --resume {folder}")


def _claim(args: argparse.Namespace) -> Path:
    """Make the folder of a new run, with its job file: --output, else a new one under runs/.

    Runs that start at the same time may look for the same folder. The one that makes it, or the job
    file in it, has it.
    """
    if getattr(args, "output", None):
        folder = Path(args.output)
        _check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_record(folder, args)
        except FileExistsError as error:
            raise ValueError(
                f"--output {folder}: another run has just started there; name another"
            ) from error
        return folder
    from fast.cli.job import short_name

    base = Path("runs") / f"{short_name(args)}-{getattr(args, 'method', 'fast')}"
    folder, n = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            n += 1
            folder = base.with_name(f"{base.name}-{n}")
        else:
            write_record(folder, args)
            return folder


@contextmanager
def _claimed(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of a new run; of one that ends before its first checkpoint nothing is left, and
    the next may have its folder."""
    named = Path(args.output) if getattr(args, "output", None) else Path("runs")
    new = [path for path in (named, *named.parents) if not path.exists()]
    folder = _claim(args)
    if folder not in new and not getattr(args, "output", None):
        new.insert(0, folder)
    try:
        with _going_on(folder):
            yield folder
    except BaseException:
        from fast.train.resume.checkpoint import list_checkpoints

        if not list_checkpoints(folder):
            (folder / JOB_FILE).unlink(missing_ok=True)
            _clear(new)
        raise


@contextmanager
def _going_on(folder: Path) -> Iterator[Path]:
    """The folder of a run, and how to go on with it where it is interrupted."""
    try:
        yield folder
    except KeyboardInterrupt:
        from fast.train.resume.checkpoint import list_checkpoints

        if list_checkpoints(folder):
            print(f"\nto go on: fast finetune --resume {printable(folder)}", file=sys.stderr)
        raise


def _clear(new: list[Path]) -> None:
    """Remove those of the folders made for a run that are empty, the innermost first."""
    for path in new:
        try:
            path.rmdir()
        except OSError:  # something of another's is in it
            return


def _restore(args: argparse.Namespace, folder: Path, given: set[str]) -> None:
    changed = sorted(given - FREE_ON_RESUME)
    if changed:
        flag = changed[0].replace("_", "-")
        raise ValueError(f"--resume goes on exactly as {folder}/{JOB_FILE} says; drop --{flag}")
    saved = read_record(folder, "--resume", args.parser, "model" in given)
    fill_defaults(saved)
    if not saved.data:
        raise ValueError(f"{folder / JOB_FILE} is damaged or was changed: it names no data")
    for name, value in vars(saved).items():
        if name not in given:
            setattr(args, name, value)
    from fast.models.saved import MANIFEST_FILE
    from fast.train.resume.checkpoint import list_checkpoints

    if not list_checkpoints(folder) and not (folder / MANIFEST_FILE).exists():
        print(
            f"note: {printable(folder)} has no checkpoint yet: the run starts from the beginning",
            file=sys.stderr,
        )
        del args.resume
