"""An argparse parser whose errors are one line, raised and not printed."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fast.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """Raises ValueError for what it cannot read: argparse prints its whole usage first."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists the options)")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Raise ValueError for arguments that no option takes."""
        name = next((text for text in unknown if text.startswith("-")), "").partition("=")[0]
        hint = did_you_mean(name, self._option_string_actions)
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
