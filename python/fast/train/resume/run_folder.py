"""The folder of a run: claim it, check which run it may resume, and notice when it disappears."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fast.adapt.state import differences
from fast.files import (
    check_writable,
    clear_unfinished,
    missing_folders,
    read_json,
    remove_empty,
    write_json,
    writing,
)
from fast.models.saved.claim import CLAIM_FILE, claim, is_going_on, run_of, same_file
from fast.models.saved.files import (
    HISTORY_FILE,
    MANIFEST_FILE,
    OPTIONS_FILE,
    list_checkpoints,
    options_file,
)
from fast.ranks import ALONE, Ranks
from fast.train.config import TrainConfig
from fast.train.log.history import BOARD_FOLDER
from fast.train.log.lines import LINES_FILE


class RunFolder:
    """A claim on the folder of a run, for as long as the block lasts or the process lives.

    The claim is a file with the run's id, and a lock on that file, which the system releases when
    the process is killed. Each checkpoint carries the id. A run that fails before its first
    checkpoint leaves no file behind.

    Args:
        config: its `output` or `resume` names the folder.
        ranks: the processes of the run; the first one claims and writes for all.

    Raises:
        FileNotFoundError: there is nothing to resume from.
        ValueError: another run is going on in the folder, or has left checkpoints there; the run to
            resume had other options; or the folder cannot be written to. Nothing is changed then.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks = config, ranks
        self.path = Path(config.output or str(config.resume))
        self.source = Path(config.resume) if config.resume else None
        self.run = ""
        with ranks.together():
            if ranks.first:
                self._open()
        self.run = ranks.from_first(self.run)

    def _open(self) -> None:
        config = self.config
        _check(config, self.path, self.source)
        check_writable(self.path, "output" if config.output else "resume")
        goes_on = self.source if self.goes_on else None
        self.run = run_of(goes_on) if goes_on else secrets.token_hex(8)
        self.new = missing_folders(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._file = claim(self.path)
        if not goes_on:
            try:
                self._write()
            except OSError:  # a full disk
                self._clear()
                with suppress(OSError):
                    self._file.close()
                raise
        clear_unfinished(self.path)

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on in the folder that it was in before."""
        return self.source is not None and self.source.resolve() == self.path.resolve()

    def _write(self) -> None:
        facts = {"run": self.run, "host": socket.gethostname(), "process": os.getpid()}
        with writing(self.path / CLAIM_FILE):
            self._file.truncate(0)
            self._file.write(json.dumps(facts) + "\n")
            self._file.flush()

    def start(self) -> None:
        """Write the options, once everything has been checked."""
        self.check()
        if self.ranks.first and not self.goes_on:
            write_json(self.path / OPTIONS_FILE, dataclasses.asdict(self.config))

    def check(self) -> None:
        """Raise FileNotFoundError where the folder or its claim no longer belongs to this run."""
        with self.ranks.together():
            if self.ranks.first:
                self._check_claim()

    def _check_claim(self) -> None:
        try:
            same = same_file(self._file, self.path / CLAIM_FILE) and run_of(self.path) == self.run
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise FileNotFoundError(
                f"output: {self.path} was deleted, moved or taken by another run while this one "
                "was going on; it stops here"
            )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.ranks.first:
            return
        try:
            if error is not None and not self.goes_on and not list_checkpoints(self.path):
                self._clear()
        finally:
            self._file.close()

    def _clear(self) -> None:
        if not (self.path / CLAIM_FILE).exists():  # the folder is gone, or belongs to another run
            return
        shutil.rmtree(self.path / BOARD_FOLDER, ignore_errors=True)
        clear_unfinished(self.path)
        for name in (HISTORY_FILE, LINES_FILE, OPTIONS_FILE, CLAIM_FILE):
            (self.path / name).unlink(missing_ok=True)
        remove_empty(self.new)


def _check(config: TrainConfig, folder: Path, source: Path | None) -> None:
    if source is None:
        if (folder / MANIFEST_FILE).exists():
            raise ValueError(f"output: {folder} holds the result of another run; name another")
        if folder.is_dir() and list_checkpoints(folder):
            raise ValueError(
                f"output: {folder} holds checkpoints of another run; pass resume={str(folder)!r} "
                "to go on with it, or another folder"
            )
        return
    path = options_file(source)
    if not path.is_file() or not list_checkpoints(source):
        raise FileNotFoundError(
            f"nothing to resume from: no checkpoint and {path.name} in {source}; pass "
            f"output={str(source)!r} to start from the beginning"
        )
    other = folder.resolve() != source.resolve()
    if other and is_going_on(source):
        raise ValueError(f"resume: the run in {source} is still going on")
    if other and folder.is_dir() and list_checkpoints(folder):
        raise ValueError(
            f"output: {folder} holds checkpoints already; pass resume={str(folder)!r} to go on "
            f"with those, not {source}'s, or another folder"
        )
    check_options(config, read_json(path), source)


def check_options(config: TrainConfig, options: dict[str, Any], source: Path) -> None:
    """Raise ValueError where the run in `source` had other options."""
    now, free = config.computed(), config.free_on_resume()
    # Options that the other version did not have yet were at their defaults.
    were = TrainConfig().computed() | options
    changes = differences({k: v for k, v in were.items() if k not in free}, now)
    if changes:
        raise ValueError(f"cannot resume {source} with other options: {changes}")
