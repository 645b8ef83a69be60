"""A diagonal in 7 bits per entry, one float32 scale per 128 entries.

The codes are those of 8 bits of the compact optimizer states, of which the last is left out: half
as many values, a quarter of an octave apart, which is finer than an entry's sampling error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastkernels import codes as codec
from fastkernels.codes import CODE_BLOCK

BITS = 7
# The draw with which `encode` rounds to the nearest even code.
NEAREST_EVEN = 1 << 20


@dataclass(frozen=True, repr=False)
class Codes:
    """The diagonal of one tensor.

    Attributes:
        codes: even numbers, uint8, in the shape of the tensor.
        scales: float32, one per 128 entries.
    """

    codes: Tensor
    scales: Tensor

    def __repr__(self) -> str:
        return f"Codes({list(self.codes.shape)})"

    @classmethod
    def of(cls, value: Tensor) -> Codes:
        flat = value.detach().float().cpu().contiguous().flatten()
        codes, scales = codec.encode(flat, NEAREST_EVEN, signed=False)
        return cls((codes & 0xFE).view(value.shape), scales)

    def decode(self) -> Tensor:
        flat = codec.decode(self.codes.flatten(), self.scales, signed=False)
        return flat.view(self.codes.shape)

    def packed(self) -> Tensor:
        """The codes as 7 bits each, without gaps, high bit first; uint8 [packed_size]."""
        bits = np.unpackbits(self.codes.flatten().numpy()[:, None], axis=1)[:, :BITS]
        return torch.from_numpy(np.packbits(bits))

    @classmethod
    def unpacked(cls, packed: Tensor, scales: Tensor, shape: Sequence[int]) -> Codes:
        """The way back from `packed`."""
        count = math.prod(shape)
        bits = np.unpackbits(packed.numpy(), count=BITS * count).reshape(count, BITS)
        return cls(torch.from_numpy(np.packbits(bits, axis=1)).view(torch.Size(shape)), scales)


def packed_size(count: int) -> int:
    """Bytes of the packed codes of `count` entries."""
    return -(-BITS * count // 8)


def num_scales(count: int) -> int:
    return -(-count // CODE_BLOCK)
