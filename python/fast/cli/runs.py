"""The runs of a command that compares methods: each is kept as a file, and is not run again."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fast.adapt.methods import METHODS
from fast.cli.notes import print_notes
from fast.cli.report.summary import Run
from fast.cli.run_key import run_key
from fast.cli.spec.methods import ALL, MethodsSpec, SweepSpec
from fast.cli.task.digits import digits_task, few_threads
from fast.cli.task.load import LoadedTask, load_task
from fast.files import check_writable, write_json
from fast.heads.adapters import import_peft
from fast.models.device import pick_device
from fast.train.log.lines import quiet, steps_log

KEY_DIGITS = 8


@contextmanager
def opened(spec: MethodsSpec, command: str) -> Iterator[tuple[LoadedTask, Path]]:
    """The task of `--demo` or of the command line, and the folder for its results.

    Raises:
        ValueError: the folder cannot be written to.
    """
    pick_device(spec.training.device)
    name = "digits" if spec.demo else spec.task.short_name
    folder = Path(spec.output or f"runs/{command}-{name}")
    check_writable(folder, "--output")
    if not spec.demo:
        yield load_task(spec.task, spec.training), folder
        return
    with few_threads():
        yield digits_task(), folder


def runnable(methods: tuple[str, ...], task: LoadedTask) -> list[str]:
    """The methods to run, with `all` replaced by every method that has what it needs.

    Raises:
        ValueError: a named method needs source inputs, and there are none.
        ImportError: a named method needs PEFT, which cannot be imported.
    """
    named = METHODS if ALL in methods else methods
    lacks = {name: error for name in named if (error := _lacks(name, task)) is not None}
    if ALL in methods:
        for name, error in lacks.items():
            print_notes(f"{name} is left out: {error}")
        return [name for name in METHODS if name not in lacks]
    for error in lacks.values():
        raise type(error)(f"--methods: {error}")
    return list(methods)


def _lacks(name: str, task: LoadedTask) -> Exception | None:
    """What a method needs and does not have here, as an error."""
    method = METHODS[name]
    if method.replay and task.source_inputs is None:
        return ValueError(f"{name} trains on source inputs, and none were given")
    if method.adapter_rank:
        try:
            import_peft()
        except ImportError as error:
            return error
    return None


class Runner:
    """Runs, or reads back, single runs of one task.

    Args:
        folder: finished runs are kept in its `runs/`.
    """

    def __init__(self, spec: SweepSpec, task: LoadedTask, folder: Path):
        self.spec, self.task, self.folder = spec, task, folder

    def all_seeds(self, method: str, setting: str = "", **changes: Any) -> list[Run]:
        """One run for each of `--seeds`, at that rate of `--lr` which was best for the first seed.

        Args:
            setting: what the runs differ in from others of this method, such as `"strength 0.1"`:
                it is printed, and is part of their names.
            changes: options of `fast.finetune`, over those of the command line.

        Raises:
            FloatingPointError: a run diverged, and there is no other rate.
        """
        seeds, rates = self.spec.seeds, self.spec.learning_rates
        first: dict[float | None, Run] = {}
        for lr in rates:
            try:
                first[lr] = self._one(method, seeds[0], lr, setting, changes)
            except FloatingPointError as error:
                if not first and lr == rates[-1]:
                    raise
                print_notes(f"{method} seed {seeds[0]} lr {lr:g} diverged: {error}")
        best = max(first, key=lambda x: (first[x].target_accuracy, first[x].source_accuracy or 0))
        more = [self._one(method, seed, best, setting, changes) for seed in seeds[1:]]
        return [first[best], *more]

    def _one(
        self, method: str, seed: int, lr: float | None, setting: str, changes: dict[str, Any]
    ) -> Run:
        """One run. If `lr` is None, it has the rate of `changes`, or the method's own."""
        rate = {} if lr is None else {"lr": lr}
        options = {**changes, **rate, "method": method, "seed": seed}
        config = dataclasses.replace(self.spec.training, **options)
        key = run_key(self.spec.task, config, self.spec.demo)
        # The key is in the name, so that the same folder keeps the runs of other options.
        label = setting.replace(" ", "").replace("%", "p")
        parts = (method, label, rate and f"lr{lr:g}", f"seed{seed}", key[:KEY_DIGITS])
        file = self.folder / "runs" / f"{'-'.join(part for part in parts if part)}.json"
        finished = read_run(file, key)
        if finished is not None:
            print(f"{finished} (kept from before)")
            return finished
        start = time.monotonic()
        with quiet(steps_log):
            run = Run.of(self.task.adapt(config), time.monotonic() - start, setting)
        write_json(file, {"key": key, **vars(run)})
        print(f"{run} ({run.seconds:.0f} s)")
        return run


def read_run(file: Path, key: str) -> Run | None:
    """The finished run in a file; None if there is none, or its key is another.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text())
        if not isinstance(saved, dict):
            raise TypeError("it holds no run")
        return Run(**saved) if saved.pop("key", None) == key else None
    except (ValueError, TypeError) as error:  # no UTF-8, no JSON, or other entries
        raise ValueError(f"{file} is damaged ({error}); delete it to run it again") from error
