"""Versions and hardware of this process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

import fast


def describe() -> dict[str, str]:
    """Versions and hardware, one line each."""
    facts = {
        "fast": fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton", "triton") or "missing",
        "numpy": importlib.metadata.version("numpy"),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "gpu": "none",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return facts


def version_of(distribution: str, module: str) -> str | None:
    """Version of an installed library without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(module) else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
