"""The operators that torchvision's Python parts need to be imported, also in another process."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import torch

_LIBRARIES: list[torch.library.Library] = []  # an operator ends with its library


def declare() -> None:
    """Let timm and torchvision be imported where torchvision's compiled part does not load.

    That is so where its wheel is of another build of torch: with CUDA, say, beside a torch without.
    The Python parts then lack nothing but the declarations of these operators, which no network
    that is tested here calls.
    """
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return
    for compiled in Path(package.origin).parent.glob("_C*.so"):  # _C_stable.so since 0.29
        with contextlib.suppress(OSError):
            torch.ops.load_library(compiled)
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
            "int pooled_width, int sampling_ratio, bool aligned) -> Tensor"
        )
        _LIBRARIES.append(library)
