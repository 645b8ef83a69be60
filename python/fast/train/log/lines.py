"""The logger of a run: what it is doing, as lines on stderr and in a file of its folder."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fast.errors import warn
from fast.progress import write_line

LINES_FILE = "run.log"


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
def quiet(logger: logging.Logger) -> Iterator[None]:
    """Log no information: for several runs whose results are reported together."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


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
