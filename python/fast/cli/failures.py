"""An exception as an exit code and a line for the user."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path
from types import FrameType

from fast.cli.values import model_file

TRACEBACK = "FAST_TRACEBACK"
FAILED, USER_ERROR, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 2, 130, 141, 143
# Errors of writing; whoever writes a file names it.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Errors whose messages are written for users; those of others are about the code that raises them.
EXPLAINED = (ValueError, TypeError, OSError, ImportError, ArithmeticError)


def explain(error: Exception, model: str | None) -> tuple[int, str]:
    """The exit code and the message of an error.

    Args:
        model: the value of --model, whose own code may have raised the error.
    """
    kind = type(error).__name__  # torch and fastkernels, which define some, are not imported here
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return USER_ERROR, f"out of memory: lower --batch-size ({error})"
    if isinstance(error, UnicodeEncodeError):  # a name of a file, with bytes that are not UTF-8
        way_out = "rename the file, or set a locale of UTF-8 (LANG=C.UTF-8)"
        return USER_ERROR, f"{error.object[:200]}: is not UTF-8: {way_out}"
    if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
        return USER_ERROR, f"what is printed cannot be written to stdout: {error.strerror}"
    if isinstance(error, EXPLAINED):
        place = _in_model_file(error.__cause__ or error, model)
        return USER_ERROR, f"{error} ({place})" if place else str(error)
    if kind in ("BackendError", "RankError"):
        return USER_ERROR, str(error)
    place = _in_model_file(error, model)
    code = FAILED if place is None else USER_ERROR
    place = place or _outside_torch(error)
    return code, f"{place} raised {kind}: {error} ({TRACEBACK}=1 shows where)"


def _outside_torch(error: BaseException) -> str:
    """`resnet.py:12`, the last line that ran outside of torch."""
    frames = list(traceback.walk_tb(error.__traceback__))
    places = [f"{Path(f.f_code.co_filename).name}:{line}" for f, line in frames if not _torch(f)]
    return places[-1] if places else type(error).__module__


def _torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


def _in_model_file(error: BaseException, model: str | None) -> str | None:
    """`file.py:12`, the last line that ran in the file that --model names or in one beside it; None
    if the error did not pass through them."""
    own = model_file(model)
    if own is None:
        return None
    folder = Path(os.path.realpath(own)).parent
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_absolute() and Path(os.path.realpath(file)).parent == folder:
            place = f"{file.name}:{line}"
    return place
