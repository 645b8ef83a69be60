"""Single runs of a comparison or a sweep; a finished one is a JSON file and is not run again."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

from fast.adapt.methods import METHODS
from fast.cli.options import add_model_and_data, training_options
from fast.cli.report.summary import Run

# Given by the command itself, or of a single run.
NOT_HERE = ("method", "seed", "lr", "output", "resume", "save_every")
ALL = "all"
KEY_DIGITS = 8
SHOWN_ONLY = ("output", "progress")


class Runner:
    """Runs, or reads back, single runs of one job.

    Args:
        folder: finished runs are kept in its `runs/`.
    """

    def __init__(self, args: argparse.Namespace, job: Any, folder: Path):
        self.args, self.job, self.folder = args, job, folder
        self.options = {k: v for k, v in training_options(args).items() if k not in NOT_HERE}

    def all_seeds(
        self, method: str, setting: str = "", options: dict[str, Any] | None = None
    ) -> list[Run]:
        """One run for each of `--seeds`, at the learning rate of `--lr` best on the first seed.

        Raises:
            FloatingPointError: a run diverged, and there is no other rate to choose.
        """
        seeds, lrs = self.args.seeds, self.args.lr
        first: dict[float | None, Run] = {}
        for lr in lrs:
            try:
                first[lr] = self.one(method, seeds[0], lr, setting, options)
            except FloatingPointError as error:
                if not first and lr == lrs[-1]:
                    raise
                print(f"note: {method} seed {seeds[0]} lr {lr:g} diverged: {error}")
        best = max(first, key=lambda x: (first[x].target_accuracy, first[x].source_accuracy or 0))
        more = [self.one(method, seed, best, setting, options) for seed in seeds[1:]]
        return [first[best], *more]

    def one(
        self,
        method: str,
        seed: int,
        lr: float | None,
        setting: str = "",
        options: dict[str, Any] | None = None,
    ) -> Run:
        """One run.

        Args:
            lr: None: the method's default.
            setting: what it differs in from other runs of this method, for its name.
            options: of `fast.finetune`, over those of the command line.
        """
        from fast.files import write_json

        chosen = self.options | (options or {})
        key = fingerprint(self.args, chosen, {"method": method, "seed": seed, "lr": lr})
        rate = "" if lr is None else f"lr{lr:g}"
        # With the key, so that the same folder keeps the runs of other options.
        parts = (method, setting, rate, f"seed{seed}", key[:KEY_DIGITS])
        name = "-".join(part for part in parts if part)
        file = self.folder / "runs" / f"{name}.json"
        kept = read_run(file, key)
        if kept is not None:
            print(f"{kept} (kept from before)")
            return kept

        import fast

        # A setting may come with a rate of its own, where changing the rest would change it.
        own = chosen.pop("lr", None)
        lr = own if lr is None else lr
        start = time.monotonic()
        model = copy.deepcopy(self.job.loaded.model)
        result = fast.finetune(model, **self.job.data, **chosen, method=method, seed=seed, lr=lr)
        done = Run.of(result, time.monotonic() - start, setting)
        write_json(file, {"key": key, **vars(done)})
        print(f"{done} ({done.seconds:.0f} s)")
        return done


def read_run(file: Path, key: str) -> Run | None:
    """A finished run of the same job; None where there is none, or the job has changed.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to run it again") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file} is damaged (it holds no run); delete it to run it again")
    if saved.pop("key", None) != key:
        return None
    try:
        return Run(**saved)
    except TypeError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to run it again") from error


def note_replaced(file: Path, args: argparse.Namespace) -> None:
    """Say which options the results had that are about to be replaced; their runs are kept.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}); move it away") from error
    were = saved.get("options") if isinstance(saved, dict) else None
    if not isinstance(were, dict):
        raise ValueError(f"{file} holds no results of fast; move it away")
    now = json.loads(json.dumps(shown_options(args), default=str))
    differ = [k for k in {**were, **now} if k not in SHOWN_ONLY and were.get(k) != now.get(k)]
    if differ:
        told = ", ".join(f"{name} {were.get(name, 'not given')}" for name in differ)
        print(f"note: replaces {file} of other options ({told}); its runs stay in runs/")


def shown_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, for the files of results."""
    return {k: v for k, v in vars(args).items() if k != "run" and v is not None}


def fingerprint(
    args: argparse.Namespace, options: dict[str, Any], run: dict[str, Any] | None = None
) -> str:
    """Hash of all that decides a run: model, data (by name, size and time of every file), options,
    the code that runs it, torch's version and the device.

    A data set on the hub is taken to stay as it is, and what a model file imports from elsewhere
    than its own folder.

    Args:
        run: what tells it from other runs of the same options.
    """
    import torch

    from fast.train.device import pick_device

    given = {name: getattr(args, name, None) for name in _job_options()}
    parts: list[Any] = [code_identity(), sorted(options.items()), sorted(given.items())]
    parts += [getattr(args, "demo", False), sorted((run or {}).items()), torch.__version__]
    parts.append(str(pick_device(options.get("device"))))
    for name, value in sorted(given.items()):
        if isinstance(value, str):
            files = _files(value) if name != "model" else _model_files(value)
            parts.append([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@cache
def code_identity() -> str:
    """Hash of the version and the source of all that takes part in a run."""
    import fast
    import fastkernels

    digest = hashlib.sha256(fast.__version__.encode())
    homes = [Path(package.__file__ or "").parent for package in (fast, fastkernels)]
    parts = ("curvature", "heads", "optim", "train")
    folders = [homes[0] / part for part in parts] + [homes[1]]
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _model_files(spec: str) -> list[Path]:
    """The file that `path/file.py:Factory` names, and those beside it, which it may import; for a
    library's network, none."""
    file, found, _ = spec.partition(".py:")
    path = Path(f"{file}.py").expanduser()
    return sorted(path.parent.glob("*.py")) if found and path.exists() else []


def method_names(text: str) -> list[str]:
    """`"fast,vanilla"` -> `["fast", "vanilla"]`, without repetitions."""
    return list(dict.fromkeys(text.split(",")))


def check_methods(methods: list[str]) -> None:
    """Raise ValueError where there is no such method."""
    unknown = [m for m in methods if m not in (*METHODS, ALL)]
    if unknown:
        raise ValueError(f"--methods: no method {unknown[0]!r}; there are {', '.join(METHODS)}")


def runnable(methods: list[str], job: Any) -> list[str]:
    """The methods to run, `all` spelled out: every one that has what it needs.

    Raises:
        ValueError: one was named that needs source inputs, and there are none.
    """
    lacking = (
        []
        if "source_inputs" in job.data
        else [name for name, method in METHODS.items() if method.replay]
    )
    if ALL in methods:
        if lacking:
            print(f"note: no source inputs were given: without {', '.join(lacking)}")
        return [name for name in METHODS if name not in lacking]
    for name in methods:
        if name in lacking:
            raise ValueError(f"--methods: {name} trains on source inputs, and none were given")
    return methods


def whole_numbers(text: str) -> tuple[int, ...]:
    """`"0,1,2"` -> `(0, 1, 2)`, without repetitions."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"whole numbers separated by commas, not {text!r}"
        ) from None


def _job_options() -> list[str]:
    """Names of the options of model and data."""
    parser = argparse.ArgumentParser()
    add_model_and_data(parser, protection=True)
    return list(vars(parser.parse_args([])))


def _files(name: str | None) -> list[Path]:
    """The file called `name`, or all files below that folder (links to folders are followed)."""
    path = Path(name or "").expanduser()
    if not name or not path.is_dir():
        return [path] if name and path.exists() else []
    found = [
        Path(root, file) for root, _, files in os.walk(path, followlinks=True) for file in files
    ]
    return sorted(file for file in found if file.exists())  # a dangling link is no file
