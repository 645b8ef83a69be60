"""Words for messages of one line."""

from __future__ import annotations

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def distribution(module: str) -> str:
    """What `pip install` calls the distribution of `module`."""
    return _DISTRIBUTIONS.get(module, module)


def first_line(error: BaseException) -> str:
    """The first line of its message that says anything; libraries write pages."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
