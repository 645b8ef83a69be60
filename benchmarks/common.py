"""What the scripts share: where results lie, and which commit and machine they belong to."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Short hash of the checkout, with a plus where it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../python", "../fastkernels"])
    return name.stdout.strip() + ("+" if changed.returncode else "")


def machine(model: torch.nn.Module | None = None) -> str:
    """Where `model` is; None: this processor."""
    place = f"{platform.processor() or platform.machine()}, one thread per run"
    if model is not None and next(model.parameters()).is_cuda:
        place = torch.cuda.get_device_name()
    return f"{place}; torch {torch.__version__}, Python {platform.python_version()}"
