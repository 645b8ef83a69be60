"""The key of a finished run: runs that could differ in anything have different keys."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fast
import fastkernels
from fast.cli.spec.task import TaskSpec
from fast.cli.values import model_file
from fast.models.device import pick_device
from fast.train.config import TrainConfig

# Packages that take no part in a run.
NO_PART = ("analysis", "cli", "integrations")


def run_key(task: TaskSpec, config: TrainConfig, demo: bool = False) -> str:
    """A hash of everything that decides a run: model, data (by name, size and time of every file),
    options, the code that runs it, torch's version and the device.

    It assumes that data sets on the hub do not change, nor modules that a model file imports from
    outside its own folder.
    """
    options = dataclasses.asdict(task)
    training = dataclasses.asdict(dataclasses.replace(config, progress=None))
    parts: list[Any] = [code_identity(), training, options, demo, torch.__version__]
    parts.append(str(pick_device(config.device)))
    for name, value in options.items():
        if isinstance(value, str):
            files = _files(value) if name != "model" else _model_files(value)
            parts.append([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@cache
def code_identity() -> str:
    """A hash of the version, and of the source of all modules that take part in a run."""
    digest = hashlib.sha256(fast.__version__.encode())
    for package in (fast, fastkernels):
        home = Path(package.__file__ or "").parent
        for file in sorted(home.rglob("*.py")):
            name = file.relative_to(home)
            if name.parts[0] not in NO_PART:
                digest.update(f"{name}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _model_files(spec: str) -> list[Path]:
    """The file that `path/file.py:Factory` names, and the files beside it, which it may import; no
    file for a library's network."""
    path = model_file(spec)
    return sorted(path.parent.glob("*.py")) if path is not None and path.exists() else []


def _files(name: str) -> list[Path]:
    """The file called `name`, or all files below that folder (links to folders are followed)."""
    path = Path(name).expanduser()
    if not name or not path.is_dir():
        return [path] if name and path.exists() else []
    files = [
        Path(root, file) for root, _, files in os.walk(path, followlinks=True) for file in files
    ]
    return sorted(file for file in files if file.exists())  # a dangling link is no file
