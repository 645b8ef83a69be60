"""Helpers for errors of one line, warnings that name the user's line, and missing libraries."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# The escape codes of colours and styles in messages of libraries.
_STYLES = re.compile(r"\x1b\[[0-9;]*m")
# Packages between a warning of ours and the line of the user's that led to it.
_INSIDE = {"fast", "fastkernels", "torch", "contextlib", "logging"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, naming the line outside of this library that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package_of(frame.f_globals) in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package_of(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]


def distribution(module: str) -> str:
    """What `pip install` calls the distribution of `module`."""
    return _DISTRIBUTIONS.get(module, module)


def import_library(module: str, need: str) -> Any:
    """An optional library.

    Args:
        module: its name.
        need: who needs it, in the words before the name: `"plots need"`.

    Raises:
        ImportError: it, or one that it needs itself, is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        name = module.partition(".")[0]
        raise ImportError(other_build(error) or _not_imported(error, name, need)) from error


def _not_imported(error: BaseException, name: str, need: str) -> str:
    # The library may be there and lack one of its own requirements, as timm torchvision.
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        return f"{need} {missing}: pip install {distribution(missing)}"
    return (
        f"{need} {name}, which is installed but cannot be imported ({first_line(error)}); its "
        "version and torch's may not fit"
    )


def other_build(error: BaseException) -> str | None:
    """The message for a torchvision that was compiled for another torch; None for other errors.

    timm, transformers and PEFT load torchvision, too, and wrap its error in others.
    """
    cause: BaseException | None = error
    while cause is not None:
        if "operator torchvision::" in str(cause):
            return (
                "torchvision was compiled for another torch than "
                f"{importlib.metadata.version('torch')}, which is here ({first_line(cause)}): "
                "install both from the same place, in one call: "
                "pip install --force-reinstall torch torchvision"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty; libraries write pages."""
    lines = (line.strip() for line in _STYLES.sub("", str(error)).splitlines())
    return next(filter(None, lines), type(error).__name__)


def printable(text: object) -> str:
    r"""`text` in one line that a terminal shows as it is.

    File and class names come from strangers. Characters that would move the cursor, clear the
    screen, end the line or turn the direction of writing are shown by their codes, such as `\x1b`.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


def some(names: Sequence[object], most: int = 3, separator: str = ", ") -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(printable, names[:most])) + more


def counted(count: int, one: str, many: str = "") -> str:
    """`1 file`, `2 files`; `many` is the plural where it is not `one` and an s."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean lr?` where one of `names` is similar, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""
