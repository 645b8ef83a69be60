"""What the benchmarks record about the machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from benchmarks.common import commit
from fastkernels.backends import native


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the machine's name is nobody's business
    machine_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.available()[1],
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }
