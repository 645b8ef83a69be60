"""Notes: what a user should know and is no error, one line each on stderr."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from fast.errors import printable


def print_notes(*messages: object) -> None:
    if logging.getLogger("fast").disabled:  # the first process prints for all: `Ranks.quiet`
        return
    for message in messages:
        print(f"fast: note: {printable(' '.join(str(message).split()))}", file=sys.stderr)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings without the line of source that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print_notes(message)
        yield
