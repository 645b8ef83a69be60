"""Pictures with their patches shuffled, whose features stand in for those of source pictures.

They have the edges, textures and colours of the target's pictures and none of their objects. A
network has to compute something else for the target's own pictures once it has learned them, and
nothing else for these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast.data.trees import leaves, mapped

# Patches along each side. Two left much of the object; with eight, whose patches of CIFAR's size
# have four pixels, the source lost more.
SIDE = 4
# A patch of fewer pixels a side has no texture.
LEAST_PIXELS = 2


def are_pictures(inputs: Any) -> bool:
    """Whether the inputs are one tensor of pictures `[N, C, H, W]`, or a tuple or mapping of it."""
    tensors = leaves(inputs)
    if len(tensors) != 1 or tensors[0].dim() != 4:
        return False
    return min(tensors[0].shape[2:]) >= SIDE * LEAST_PIXELS


def shuffled_patches(inputs: Any, count: int, generator: torch.Generator) -> Any:
    """Pictures made of patches of pictures.

    Args:
        inputs: pictures, see `are_pictures`.
        count: how many to make.
        generator: draws the pictures, and the order of the patches of all of them.

    Returns:
        `[count, C, H, W]`, as tuple or mapping where `inputs` are one. Rows and columns that the
        sides of patches leave over stay as they are.
    """

    def made(pictures: Tensor) -> Tensor:
        rows = torch.randint(len(pictures), (count,), generator=generator)
        result = pictures[rows.to(pictures.device)]  # a copy
        channels, (height, width) = result.shape[1], (s // SIDE for s in result.shape[2:])
        inner = result[:, :, : SIDE * height, : SIDE * width]
        grid = (count, channels, SIDE, height, SIDE, width)
        patches = inner.reshape(grid).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        order = torch.randperm(len(patches), generator=generator).to(patches.device)
        patches = patches[order].view(count, SIDE, SIDE, channels, height, width)
        inner.copy_(patches.permute(0, 3, 1, 4, 2, 5).reshape(inner.shape))
        return result

    return mapped(inputs, made)
