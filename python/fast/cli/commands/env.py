"""Versions, hardware, and which kernel backend runs where; what is missing, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

from fast.cli.report.table import text_table
from fast.errors import distribution

# module -> what it is for
OPTIONAL = {
    "PIL": "image files",
    "matplotlib": "plots",
    "sklearn": "fast demo",
    "timm": "models timm:NAME",
    "torchvision": "models torchvision:NAME",
    "transformers": "models transformers:NAME, texts",
    "datasets": "Hugging Face data sets",
    "tensorboard": "TensorBoard logs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import fastkernels

    machine, kernels = describe(), [asdict(row) for row in fastkernels.explain()]
    libraries = {name: version_of(distribution(name), name) for name in OPTIONAL}
    if args.json:
        print(json.dumps({**machine, "kernels": kernels, "libraries": libraries}, indent=2))
        return 0
    print("\n".join(f"{name:8} {value}" for name, value in machine.items()))
    rows = [
        [k["op"], k["backend"], k["device"], "yes" if k["available"] else "no", k["reason"]]
        for k in kernels
    ]
    print("\n" + text_table(["op", "backend", "device", "available", "reason"], rows, left=5))
    rows = [[name, libraries[name] or "missing", use] for name, use in OPTIONAL.items()]
    print("\n" + text_table(["library", "version", "for"], rows, left=3))
    return 0


def describe() -> dict[str, str]:
    """Versions and hardware of this process, one line each; also the foot of the reports."""
    import torch

    import fast

    found: dict[str, str] = {
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
        found["gpu"] = f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return found


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
