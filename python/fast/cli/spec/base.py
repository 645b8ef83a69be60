"""What the records of all commands share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from fast.cli.options import build, flag, is_part, option
from fast.cli.values import folder_name
from fast.train.config import TrainConfig

SAVED = "fast.cli.commands.saved"  # the commands that work with finished runs


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The options of a command.

    Attributes:
        about: what the command does, in a line.
        package: holds the module that is called as the command, whose `run(spec)` does it.
    """

    about: ClassVar[str]
    package: ClassVar[str] = "fast.cli.commands"

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """The record of the options that were typed.

        Raises:
            ValueError: an option is out of range, or does not go with another.
        """
        return build(cls, options)


def output_folder(default: str) -> Any:
    return option(f"folder of the results (default: {default})", read=folder_name)


def device_option() -> Any:
    return option("cpu, cuda, cuda:1, ... (default: FAST_DEVICE, or CUDA if there)")


def required(spec: Any, *names: str) -> None:
    """Raise ValueError where one of these options is missing."""
    missing = [flag(name) for name in names if not getattr(spec, name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given; see --help")


def at_least(spec: Any, name: str, least: int) -> None:
    """Raise ValueError if the option `name` is less than `least`."""
    value = getattr(spec, name)
    if value < least:
        raise ValueError(f"{flag(name)} must be at least {least}; got {value}")


def shown(spec: Any) -> dict[str, Any]:
    """The options of a run, for the files of its results: those that have a value, and those of the
    training that differ from their default."""
    return dict(_shown(spec))


def _shown(spec: Any) -> Iterator[tuple[str, Any]]:
    for f in fields(spec):
        value = getattr(spec, f.name)
        if is_part(f):
            yield from _shown(value)
        elif value is not None and not (isinstance(spec, TrainConfig) and value == f.default):
            yield f.name, value
