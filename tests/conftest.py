"""Every test starts from the same seed, on one thread."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers, cases, networks


def _declare_ops_of_torchvision() -> None:
    """Let timm and torchvision be imported where torchvision's compiled part does not load.

    That is so where its wheel is of another build of torch: with CUDA, say, beside a torch without.
    The Python parts then lack nothing but the declarations of these operators, which no network
    that is tested here calls.
    """
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return
    try:
        torch.ops.load_library(Path(package.origin).parent / "_C.so")
    except OSError:
        if not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define(
                "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
                "int pooled_width, int sampling_ratio, bool aligned) -> Tensor"
            )
            _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []  # an operator ends with its library
_declare_ops_of_torchvision()


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
