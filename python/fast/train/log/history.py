"""The history of a run, one record for each evaluation: a JSONL file, TensorBoard, callbacks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fast.adapt.result import Record
from fast.files import reading, to_json, writing
from fast.models.saved.files import HISTORY_FILE

Callback = Callable[[Record], object]
BOARD_FOLDER = "tensorboard"


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

    def add(self, record: Record) -> None:
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
                callback(record.copy())
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
        self.records: list[Record] = [json.loads(line) for line in lines.splitlines()]


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
