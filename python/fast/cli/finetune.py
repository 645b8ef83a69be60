"""Adapt a pretrained classifier to new data, and say what it still knows of the old.

  fast finetune --model timm:resnet18 --data photos/ --epochs 5
  fast finetune --model nets.py:ResNet(20) --weights resnet20.safetensors \\
      --data signs.npz --source cifar10.npz --steps 150
  fast finetune --resume runs/ResNet-signs-fast

The folder --output then holds model.safetensors (loads into the plain network), result.json,
history.jsonl, the options in config.json and job.json, and the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fast.cli.options import (
    add_model_and_data,
    add_training,
    check_training,
    require,
    training_options,
)
from fast.cli.table import percent, text_table

JOB_FILE = "job.json"
# With --resume everything else is as it was.
FREE_ON_RESUME = {"resume", "run", "device", "progress"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_data(parser, protection=True)
    add_training(parser)
    parser.set_defaults(unset=vars(parser.parse_args([])))


def run(args: argparse.Namespace) -> int:
    if hasattr(args, "resume"):
        folder = Path(args.resume)
        _restore(args, folder)
    else:
        require(args, "model", "data")
        folder = _new_folder(args)

    check_training(args)

    from fast.cli.job import load_job

    job = load_job(args)
    options = training_options(args) | {"output": str(folder)}

    import fast

    start = time.monotonic()
    with _resumable_or_gone(folder, resumed=hasattr(args, "resume")):
        if not hasattr(args, "resume"):
            _record(args, folder)
        result = fast.finetune(job.loaded.model, **job.data, **options)
    seconds = time.monotonic() - start
    result.classes = list(job.classes)
    result.save(folder)
    print(_summary(job, result, seconds))
    print(f"saved in {folder}")
    return 0


def _summary(job: Any, result: Any, seconds: float) -> str:
    config, final = result.config, result.final
    rows = [["target", "", percent(result.target_accuracy), str(job.sizes["val"])]]
    if job.source is not None:
        before, after = result.source_accuracy_before, result.source_accuracy
        rows.append(["source", percent(before), percent(after), str(job.sizes["source"])])
    budget = _budget_line(job, config.forget_budget, final["forecast"])
    steps = result.history[-1]["step"]
    kept = "" if final["step"] == steps else f", kept the best, of step {final['step']}"
    return (
        f"{job.name}: {config.method}, {steps} steps of {config.batch_size}, lr {result.lr:g}, "
        f"{seconds:.0f} s{kept}\n\n"
        + text_table(["accuracy, %", "before", "after", "samples"], rows)
        + f"\n{budget}"
    )


def _budget_line(job: Any, option: str | float | None, lost: float | None) -> str:
    """What was allowed to be forgotten, and what was measured, or forecast, at the end."""
    if option is None or lost is None:
        return ""
    from fast.train.config import Budget

    budget = Budget.parse(option)
    shown = f"{100 * lost:.2g} %" if budget.points else f"{lost:.2g} nats"
    how = (
        "forecast by the card: there were no source inputs to check on"
        if job.source_inputs is None
        else "measured on held-back source inputs"
    )
    return f"forget budget {budget}: {shown} lost at the end, {how}\n"


def _new_folder(args: argparse.Namespace) -> Path:
    """--output, which must not hold anything yet; else a new folder under runs/."""
    if getattr(args, "output", None):
        folder = Path(args.output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"--output {folder}: exists; name another, or go on with --resume {folder}"
            )
        return folder
    from fast.cli.job import short_name

    base = Path("runs") / f"{short_name(args)}-{getattr(args, 'method', 'fast')}"
    folder, n = base, 1
    while folder.exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    return folder


@contextmanager
def _resumable_or_gone(folder: Path, resumed: bool) -> Iterator[None]:
    """A run that ends before its first checkpoint leaves nothing: the next may have its folder.

    Args:
        resumed: what is in the folder was there before, and stays whatever becomes of this run.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as error:
        from fast.train.checkpoint import list_checkpoints

        kept = bool(list_checkpoints(folder))
        if not kept and not resumed:
            _clear(folder, new)
        elif kept and isinstance(error, KeyboardInterrupt):
            print(f"\nto go on: fast finetune --resume {folder}", file=sys.stderr)
        raise


def _clear(folder: Path, new: list[Path]) -> None:
    """Remove what the run wrote into `folder`, which held nothing, and the folders made for it."""
    for path in folder.iterdir() if folder.exists() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in new:
        if path.exists() and not any(path.iterdir()):
            path.rmdir()


def _record(args: argparse.Namespace, folder: Path) -> None:
    """What --resume needs to build the same model and data again."""
    from fast.files import write_json

    given = {k: v for k, v in vars(args).items() if k not in ("run", "unset", "output")}
    for name in ("weights", "data", "source", "source_inputs", "card", "model"):
        given[name] = _absolute(given[name])
    write_json(folder / JOB_FILE, given)


def _absolute(name: str | None) -> str | None:
    """Files by their absolute path, so that --resume works from anywhere; other names as is."""
    if not name:
        return name
    file, colon, rest = name.partition(".py:")
    if colon:
        return str(Path(file).expanduser().resolve()) + colon + rest
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _restore(args: argparse.Namespace, folder: Path) -> None:
    given = {k for k, v in vars(args).items() if k not in args.unset or args.unset[k] != v}
    changed = sorted(given - FREE_ON_RESUME - {"unset"})
    if changed:
        flag = changed[0].replace("_", "-")
        raise ValueError(f"--resume goes on exactly as {folder}/{JOB_FILE} says; drop --{flag}")
    file = folder / JOB_FILE
    if not file.is_file():
        raise FileNotFoundError(f"--resume {folder}: has no {JOB_FILE}; not a run of fast finetune")
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    for name, value in saved.items():
        if name not in given:
            setattr(args, name, tuple(value) if isinstance(value, list) else value)
