"""Every test starts from the same seed, on one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers, networks, kernels.update_harness

import torchvision_ops

torchvision_ops.declare()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are on the CPU, also where there is a GPU: what they learn is compared with numbers.
    Tests marked gpu name their device."""
    monkeypatch.setenv("FAST_DEVICE", "cpu")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors: torch's parallel regions cost more than they bring, above all under load."""
    torch.set_num_threads(1)
