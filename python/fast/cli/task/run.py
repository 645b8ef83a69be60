"""The run that a command works on, and the folder that it writes to."""

from __future__ import annotations

import sys
from pathlib import Path

import fast
from fast.cli.options import parser_of
from fast.cli.record import JOB_FILE, read_record
from fast.cli.spec import FinetuneSpec
from fast.cli.spec.deploy import RunSpec
from fast.deploy.predictor import Predictor
from fast.errors import printable
from fast.models.saved import FILES, MODEL_FILE


def open_run(spec: RunSpec) -> Predictor:
    """The network of a run.

    If the network is a factory in a Python file, that file is run only if --model names it, or if
    this user started the run on this machine and the file has not changed; --resume does the same.
    """
    return fast.load(spec.run, spec.model or _own_code(Path(spec.run)), device=spec.device)


def print_left_out(unreadable: dict[str, str]) -> None:
    """Say which files could not be read, and why."""
    for name, reason in unreadable.items():
        print(f"note: {printable(name)}: left out: {printable(reason)}", file=sys.stderr)


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
    if not (folder / JOB_FILE).is_file():
        return None
    parser = parser_of(FinetuneSpec)
    name = read_record(folder, "RUN", parser, named=True).get("model")
    if name is None or ".py:" not in name:
        return None
    return read_record(folder, "RUN", parser, named=False)["model"]
