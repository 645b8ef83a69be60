"""The device of a run."""

from __future__ import annotations

import os

import torch

ENVIRONMENT = "FAST_DEVICE"


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device called `name`, tried out; None: that of the environment variable FAST_DEVICE, else
    CUDA when there is one, else the CPU.

    Raises:
        ValueError: no such device, or none that can compute here; the message says which can.
    """
    name = name or os.environ.get(ENVIRONMENT) or None
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three for it
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device {str(name)!r} cannot be used here: there is {', '.join(here)}"
        ) from error
    return device
