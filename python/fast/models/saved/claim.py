"""Claim the folder of a run for one process.

The claim is a file with the id of the run, and a lock on that file. The system releases the lock
when the process is killed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from fast.files import read_json

try:
    import fcntl
except ImportError:  # on Windows a second run in the folder is noticed when one of them saves
    fcntl = None  # type: ignore[assignment]

CLAIM_FILE = "run.json"


def run_of(folder: Path) -> str:
    """The id of the run whose folder this is."""
    return str(read_json(folder / CLAIM_FILE).get("run"))


def is_going_on(folder: Path) -> bool:
    """Whether a run, in this or another process, has a claim on the folder now."""
    if not (folder / CLAIM_FILE).is_file():
        return False
    with (folder / CLAIM_FILE).open() as file:
        return not _lock(file)


def claim(folder: Path) -> IO[str]:
    """Lock the claim file of a folder, and return it.

    Raises:
        ValueError: another run has the lock.
    """
    path = folder / CLAIM_FILE
    while True:
        file = path.open("a+")
        if not _lock(file):
            file.close()
            raise ValueError(
                f"output: another run is going on in {folder} (see {CLAIM_FILE} there); name "
                "another folder, or wait for its end"
            )
        if path.exists() and same_file(file, path):
            return file
        file.close()  # the run that had it ended just now, and removed the file


def _lock(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks; `RunFolder.check` notices another run
        return True
    return True


def same_file(file: IO[str], path: Path) -> bool:
    """Whether the file is still the one at this path."""
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
