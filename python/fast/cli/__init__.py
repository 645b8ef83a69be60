"""The command line."""

from fast.cli.failures import FAILED
from fast.cli.main import main
from fast.cli.spec import COMMANDS

__all__ = ["COMMANDS", "FAILED", "main"]
