"""Where a run's history goes: stderr, a log file, a JSONL file, TensorBoard, a progress bar."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import logging.handlers
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fast.errors import warn
from fast.files import reading, to_json, writing
from fast.progress import bar, write_line

Callback = Callable[[dict[str, Any]], object]
HISTORY_FILE, LINES_FILE = "history.jsonl", "run.log"
BOARD_FOLDER = "tensorboard"


class _Stderr(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time, above the bars that are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record))


# What a run is doing. `logging.getLogger("fast").setLevel("WARNING")` silences it.
log = logging.getLogger("fast")
if not log.handlers:
    log.addHandler(_Stderr())
    log.propagate = False
    if log.level == logging.NOTSET:  # the user may have set it before this module is imported
        log.setLevel(logging.INFO)
# The phases of a run and its evaluations, apart from what it guessed and planned.
steps_log = logging.getLogger("fast.steps")


@contextmanager
def quiet_steps() -> Iterator[None]:
    """Log no phases and evaluations: for several runs whose results are reported together."""
    level = steps_log.level
    steps_log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        steps_log.setLevel(level)


class _File(logging.FileHandler):
    """Writes lines to a file. If that fails, as on a full disk, it says so once and writes no more,
    and the run goes on without its log."""

    failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.failed = True
        warn(
            f"{self.baseFilename} cannot be written ({error.strerror}): the run goes on without it"
        )

    def close(self) -> None:
        with suppress(OSError):  # it holds lines that could not be written, which was said
            super().close()


class LogFile:
    """Writes what is logged during a run to a file in its folder, each line with its time.

    Lines that come before `write_to` wait in memory, so a run that fails early leaves no file.
    """

    def __init__(self) -> None:
        self._waiting = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self._file: _File | None = None
        log.addHandler(self._waiting)

    def write_to(self, folder: Path | None) -> None:
        log.removeHandler(self._waiting)
        if folder is None:
            return
        self._file = _File(folder / LINES_FILE, encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._waiting.setTarget(self._file)
        self._waiting.flush()
        log.addHandler(self._file)

    def close(self) -> None:
        log.removeHandler(self._waiting)
        if self._file is not None:
            log.removeHandler(self._file)
            self._file.close()


class RunLog:
    """Appends one record per evaluation.

    Args:
        folder: the run's folder; None writes no files, as on all ranks but the first.
        earlier: history of the interrupted run that this one resumes, from `read_history`; lines
            which that run wrote after its checkpoint are dropped.
        callbacks: functions that are called with each record.
    """

    def __init__(
        self,
        folder: Path | None,
        earlier: History | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = callbacks
        self.history = list(earlier.records) if earlier else []
        self._file: BinaryIO | None = None
        self._board: Any = None
        self._length, self._hash = 0, _hash()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / HISTORY_FILE
        self._file = self._open(self._path, earlier.lines if earlier else b"")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / BOARD_FOLDER))

    def _open(self, path: Path, lines: bytes) -> BinaryIO:
        """Open the file of the history behind these lines; what follows them is cut off."""
        path.touch()
        file = path.open("r+b")
        if file.read(len(lines)) != lines:  # the run goes on in another folder
            file.seek(0)
            file.write(lines)
        file.truncate()
        self._count(lines)
        return file

    def add(self, record: dict[str, Any]) -> None:
        """Write a record to the file and the board, and call the callbacks with it."""
        self.history.append(record)
        if self._file:
            line = f"{to_json(record)}\n".encode()
            with writing(self._path):
                self._file.write(line)
                self._file.flush()
            self._count(line)
        if self._board:
            for key, value in record.items():
                if key != "step" and isinstance(value, float):
                    self._board.add_scalar(key, value, record["step"])
        for callback in self.callbacks:
            try:
                callback(dict(record))
            except Exception as error:
                error.add_note(f"in the callback {name_of(callback)}, at step {record['step']}")
                raise

    def _count(self, lines: bytes) -> None:
        self._length += len(lines)
        self._hash.update(lines)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the history: the length and hash of the file so far, and the
        numbers that JSON cannot express."""
        if self._file:
            os.fsync(self._file.fileno())
        odd = [
            (i, key, repr(value))
            for i, record in enumerate(self.history)
            for key, value in record.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        return {"bytes": self._length, "hash": self._hash.hexdigest(), "not finite": odd}

    def close(self) -> None:
        if self._file:
            with writing(self._path):
                self._file.close()
        if self._board:
            self._board.close()


class History:
    """The lines of a history file, and the records that they hold."""

    def __init__(self, lines: bytes) -> None:
        self.lines = lines
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines.splitlines()]


def read_history(folder: Path, state: dict[str, Any]) -> History:
    """The history of a run at its checkpoint.

    Args:
        state: what its `RunLog.state()` returned then.

    Raises:
        ValueError: the file has changed since; the message names it.
    """
    path = folder / HISTORY_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing, and the checkpoint goes on from it")
    with path.open("rb") as file:
        lines = file.read(state["bytes"])
    if _hash(lines).hexdigest() != state["hash"]:
        raise ValueError(f"{path} is damaged, or is not of the run whose checkpoint is beside it")
    with reading(path):
        history = History(lines)
        for i, key, value in state["not finite"]:
            history.records[i][key] = float(value)
    return history


def _hash(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks of a run.

    Raises:
        TypeError: they are not a list of functions.
    """
    functions = tuple(callbacks) if isinstance(callbacks, Iterable) else (None,)
    if not all(map(callable, functions)):
        raise TypeError(f"callbacks must be a list of functions of a record; got {callbacks!r}")
    return functions


def name_of(callback: Callback) -> str:
    return getattr(callback, "__qualname__", type(callback).__qualname__)


def progress_bar(show: bool | None, start: int, steps: int, method: str) -> Any:
    """The bar of a run, which stays; see `fast.progress`."""
    return bar(steps, method, show, unit="step", start=start, leave=True)


def figures(record: dict[str, Any], before: float | None = None, between: str = " ") -> str:
    """The few figures that a progress bar has room for: what is kept, then what is learned.

    Args:
        before: source accuracy at the pretrained weights.
        between: the separator.
    """
    parts = []
    if record.get("source_accuracy") is not None:
        change = "" if before is None else f" ({100 * (record['source_accuracy'] - before):+.1f})"
        parts.append(f"source {100 * record['source_accuracy']:.1f}{change}")
    if record.get("forecast") is not None:
        parts.append(f"forgets {round(record['forecast'], 2) + 0.0:.2f}")  # never -0.00
    if record.get("target_accuracy") is not None:
        parts.append(f"target {100 * record['target_accuracy']:.1f}")
    return between.join(parts)


def line(record: dict[str, Any], steps: int, epochs: float, before: float | None) -> str:
    """An evaluation as a line of the log.

    Args:
        steps: steps of the whole run.
        epochs: passes over the training data so far.
        before: source accuracy at the pretrained weights.
    """
    loss = "" if record["loss"] is None else f", loss {record['loss']:.4g}"
    rest = f"{loss}, {record['seconds']:.0f} s"
    text = figures(record, before, ", ") or "nothing is measured"
    return f"step {record['step']}/{steps} (epoch {epochs:.1f}): {text}{rest}"
