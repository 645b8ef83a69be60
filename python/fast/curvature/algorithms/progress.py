"""Progress bars for long estimates: shown by default when a person is watching."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(total: int, what: str, progress: bool | None) -> Any:
    """A tqdm bar that counts products; `progress=None` shows it where stderr is a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, desc=what, unit="product", disable=not shown, leave=False)
