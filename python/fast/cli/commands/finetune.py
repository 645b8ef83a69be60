"""`fast finetune`."""

from __future__ import annotations

import dataclasses
import time
import warnings
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import fast
from fast.cli.folders import check_new, continued, run_folder
from fast.cli.folds import cross_validate
from fast.cli.job_file import absolute
from fast.cli.report.finetune import plan_table, summary, what_next
from fast.cli.spec import FinetuneSpec
from fast.cli.task.load import LoadedTask, load_task
from fast.errors import printable
from fast.models.device import pick_device
from fast.ranks import Ranks, joined
from fast.train.finite import Diverged, diverged


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
            config = continued(config, resumed)
        elif config.output and not spec.plan and ranks.first:
            check_new(Path(config.output))
        task = load_task(spec.task, config, measured=False)
    if spec.plan:
        plan = task.plan(config)
        print(f"{plan}\n\n{plan_table(plan, task.head(config))}")
        return 0
    if spec.task.folds:
        cross_validate(spec, task, ranks)
        return 0
    start = time.monotonic()
    with run_folder(spec, resumed, ranks) as folder:
        options = task.options(dataclasses.replace(config, output=str(folder)))
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


def _describe(result: fast.Result, spec: FinetuneSpec, task: LoadedTask) -> None:
    """Tell the result what the command line knows about network and data."""
    result.classes = list(task.classes)
    result.data = task.description
    if result.by_class is not None:
        right, samples = result.by_class
        result.data["accuracy_by_class"] = {"right": right, "samples": samples}
    result.network = absolute(spec.task.model)
    result.preparation = task.preparation
