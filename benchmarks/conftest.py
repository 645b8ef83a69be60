"""What the benchmarks record about the machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastkernels.backends import native

HERE = Path(__file__).parent


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the machine's name is nobody's business
    machine_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.available()[1],
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(
            _git("status", "--porcelain", "--untracked-files=no", "csrc", "fastkernels", "python")
        ),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }
