"""Apply the user's transform of training batches, and check what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fast.data.trees import kind, leaves, length

Transform = Callable[[Any], Any]


class Augmentation:
    """A transform of training batches.

    Args:
        transform: takes and returns a batch of inputs, on the CPU; None changes nothing.
        check: raises where the network does not take its argument; called for the first batch.
    """

    def __init__(self, transform: Transform | None, check: Callable[[Any], None]) -> None:
        self.transform = transform
        self._check: Callable[[Any], None] | None = check

    def __call__(self, inputs: Any, size: int) -> Any:
        """The batch as the network is trained on it.

        Args:
            size: samples in the batch.

        Raises:
            TypeError, ValueError: the transform returned no batch of as many inputs, or one that
                the network does not take.
        """
        if self.transform is None:
            return inputs
        inputs = self.transform(inputs)
        batch = isinstance(inputs, (Tensor, Mapping, tuple, list))
        if not batch or not leaves(inputs):
            raise TypeError(
                f"transform returned {kind(inputs)}; it must return the batch of inputs, as tensors"
            )
        if length(inputs) != size:
            raise ValueError(f"transform made {length(inputs)} inputs of {size}; it must keep them")
        if self._check is not None:
            self._check(inputs)
            self._check = None
        return inputs
