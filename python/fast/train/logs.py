"""Where a run's history goes: a JSONL file always, TensorBoard and a progress bar when there is
one."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fast.files import to_json

HISTORY_FILE = "history.jsonl"


class _Stderr(logging.StreamHandler[Any]):
    """Writes to whatever `sys.stderr` is at the time."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass


# What a run is about to do. `logging.getLogger("fast").setLevel("WARNING")` silences it.
log = logging.getLogger("fast")
if not log.handlers:
    log.addHandler(_Stderr())
    log.setLevel(logging.INFO)
    log.propagate = False


class RunLog:
    """Appends one record per evaluation.

    Args:
        folder: of the run, or None for nowhere.
        kept: records of an interrupted run that this one goes on from; later ones are dropped.
    """

    def __init__(self, folder: Path | None, kept: list[dict[str, Any]]) -> None:
        self.history = list(kept)
        self._file = None
        self._board: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / HISTORY_FILE).open("w")
        for record in kept:
            self._file.write(to_json(record) + "\n")
        self._file.flush()
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def add(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self._file:
            self._file.write(to_json(record) + "\n")
            self._file.flush()
        if self._board:
            for key, value in record.items():
                if key != "step" and isinstance(value, float):
                    self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def progress_bar(show: bool | None, start: int, steps: int, method: str) -> Any:
    """A tqdm bar on stderr; quiet when that is no terminal, unless asked for."""
    if show is None:
        show = sys.stderr.isatty()
    return tqdm(total=steps, initial=start, desc=method, unit="step", disable=not show, leave=True)


def summary(record: dict[str, Any]) -> dict[str, str]:
    """The few figures that a progress bar has room for."""
    names = {
        "loss": "loss",
        "target_accuracy": "target",
        "source_accuracy": "source",
        "forecast": "forgets",
    }
    return {s: f"{record[k]:.3f}" for k, s in names.items() if record.get(k) is not None}
