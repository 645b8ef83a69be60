"""The run that a command works on, and the folder that it writes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fast
from fast.cli.notes import print_notes
from fast.cli.spec.deploy import RunSpec
from fast.cli.spec.finetune import run_options
from fast.cli.values import model_file
from fast.data.sources.table import column_names
from fast.data.sources.types import is_drawn
from fast.deploy.predictor import Predictor
from fast.files import JOB_FILE, read_json_if_there
from fast.models.saved import DATA_FILE, FILES, MODEL_FILE


def open_run(spec: RunSpec) -> Predictor:
    """The network of a run.

    If the network is a factory in a Python file, that file is run only if --model names it, or if
    this user started the run on this machine and the file has not changed; --resume does the same.
    """
    return fast.load(spec.run, spec.model or _own_code(Path(spec.run)), device=spec.device)


def job_of(folder: Path) -> dict[str, Any]:
    """The options of the run in a folder; empty if the command line did not start it."""
    if not (folder / JOB_FILE).is_file():
        return {}
    return run_options(folder, "RUN", named=True)


def own_columns(job: dict[str, Any], paths: Sequence[str]) -> dict[str, str]:
    """`input_column` and `label_column` as the run had them, where every table has such a column.

    Args:
        job: the options of the run.
        paths: tables, perhaps among other files.
    """
    files = [Path(path).expanduser() for path in paths]
    tables = [names for names in map(column_names, files) if names]
    return {
        option: job[option]
        for option in ("input_column", "label_column")
        if job.get(option) and tables and all(job[option] in names for names in tables)
    }


def same_place(a: str, b: str) -> bool:
    """Whether two names are of one data set."""
    paths = [Path(name).expanduser() for name in (a, b)]
    return a == b or (all(p.exists() for p in paths) and paths[0].samefile(paths[1]))


def is_data_of(run: Path, of_run: str, name: str, samples_hash: str) -> bool:
    """Whether these are the data that a run adapted to, which may have been moved.

    Args:
        of_run: the name that they had.
        name, samples_hash: of the data that are there now.

    Raises:
        ValueError: the run held out a share of them, and other samples are there now, so that the
            share cannot be drawn again.
    """
    in_place = same_place(name, of_run)
    recorded = read_json_if_there(run / DATA_FILE).get("data") or {}
    if "samples_hash" not in recorded:  # by an older version
        return in_place
    same = samples_hash == recorded["samples_hash"]
    if in_place and not same and is_drawn(recorded):
        raise ValueError(
            f"{name}: has other samples than the run was started with, so that those it held "
            "out cannot be told from those it was trained on: put them back, or name labelled data "
            "that it has not seen"
        )
    return in_place or same


def print_left_out(unreadable: dict[str, str]) -> None:
    """Say which files could not be read, and why."""
    for name, reason in unreadable.items():
        print_notes(f"{name}: left out: {reason}")


def check_replaceable(folder: Path, own: bool) -> None:
    """Refuse to write into a folder that holds something else.

    Args:
        own: the folder holds what the same command wrote before.

    Raises:
        ValueError: the folder holds more than the files that a command writes before the network.
    """
    first = set(FILES) - {MODEL_FILE}
    if not own and folder.is_dir() and any(file.name not in first for file in folder.iterdir()):
        raise ValueError(f"--output {folder}: is not empty; name another folder")


def _own_code(folder: Path) -> str | None:
    """The factory that job.json names; None for networks of libraries.

    Raises:
        ValueError: its file must not be run; the message says why.
    """
    if model_file(job_of(folder).get("model")) is None:
        return None
    return run_options(folder, "RUN", named=False)["model"]
