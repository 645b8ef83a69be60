"""Which folder a run may write to, and which run it may go on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from fast.train.checkpoint import list_checkpoints
from fast.train.config import TrainConfig

CONFIG_FILE = "config.json"
# Options that say where and how a run is shown, not what it computes: they may differ on resume.
PLACE_OPTIONS = ("output", "resume", "progress", "device", "save_every")


def check_folder(config: TrainConfig, folder: Path) -> None:
    """Refuse, before anything is changed, a folder that does not fit what was asked for.

    Raises:
        FileNotFoundError: nothing to resume from.
        ValueError: the run to resume had other options; or a new run would write into a folder that
            holds checkpoints of another, which a later resume would take for its own.
    """
    if config.resume is None:
        if list_checkpoints(folder):
            raise ValueError(
                f"output: {folder} holds checkpoints of another run; pass resume={str(folder)!r} "
                "to go on with it, or another folder"
            )
        return
    source = Path(config.resume)
    path = source / CONFIG_FILE
    if not path.is_file() or not list_checkpoints(source):
        raise FileNotFoundError(
            f"nothing to resume from: no checkpoint and {path.name} in {source}"
        )
    if folder.resolve() != source.resolve() and list_checkpoints(folder):
        raise ValueError(
            f"output: {folder} holds checkpoints already; pass resume={str(folder)!r} to go on "
            f"with those, not {source}'s, or another folder"
        )
    try:
        saved = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    # Options that this version has and that one had not were at their defaults.
    were = json.loads(json.dumps(dataclasses.asdict(TrainConfig()))) | saved
    differ = [k for k in were if k not in PLACE_OPTIONS and were[k] != now.get(k)]
    if differ:
        changes = ", ".join(f"{k} was {_told(were[k])}, is {_told(now.get(k))}" for k in differ)
        raise ValueError(f"cannot resume {source} with other options: {changes}")


def _told(value: object) -> str:
    return "the default" if value is None else repr(value)
