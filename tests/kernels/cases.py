"""Cases of the kernel tests, as data; every backend runs all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 8192  # kChunk in csrc/include/fast/anchored.h
TILE = 512  # kTile in csrc/cpu/storage.h

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0,),
    "one": (1,),
    "three": (3,),
    "odd": (17, 23),
    "tile_border": (TILE + 1,),
    "chunk_less": (CHUNK - 1,),
    "chunk": (CHUNK,),
    "chunk_more": (CHUNK + 1,),
    "many": (100_003,),
}


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One way to call an update op."""

    anchor_decay: float = 0.0
    curvature: bool = False
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    grad_scale: float | None = None
    maximize: bool = False


FEATURES = {
    "plain": Feature(),
    "decay": Feature(weight_decay=0.1),
    "anchor": Feature(anchor_decay=0.5),
    "curvature": Feature(anchor_decay=0.5, curvature=True),
    "clip": Feature(max_grad_norm=0.01, anchor_decay=0.5),
    "all": Feature(
        anchor_decay=0.5,
        curvature=True,
        weight_decay=0.1,
        max_grad_norm=0.01,
        grad_scale=1024.0,
        maximize=True,
    ),
}


def gradient_layouts() -> dict[str, tuple[Tensor, Tensor]]:
    """(parameter, gradient) of one shape whose elements lie in another order or share memory."""
    base = torch.randn(6, 5, 4, 3)
    return {
        "channels_last_both": (
            torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last),
            base.to(memory_format=torch.channels_last),
        ),
        "channels_last_parameter": (
            torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last),
            base.clone(),
        ),
        "channels_last_gradient": (
            torch.randn(6, 5, 4, 3),
            base.to(memory_format=torch.channels_last),
        ),
        "transposed": (torch.randn(30, 12), torch.randn(12, 30).t()),
        "expanded": (torch.randn(50, 40), torch.randn(1, 40).expand(50, 40)),
        "expanded_scalar": (torch.randn(1000), torch.ones(1).expand(1000)),
        "sliced": (torch.randn(50, 40), torch.randn(50, 80)[:, ::2]),
        "size_one_strides": (
            torch.randn(7, 1, 3).as_strided((7, 1, 3), (3, 99, 1)),
            torch.randn(7, 1, 3),
        ),
        "sliced_parameter": (torch.randn(50, 80)[:, ::2], torch.randn(50, 40)),
    }
