"""The user's transform of training batches: what it returns is checked where it is first called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fast.data.dataset import Transform, length, move
from fast.data.trees import kind, leaves, taking
from fast.heads import evaluating, forward_logits, pick


class Augmentation:
    """`transform`, or nothing where it is None.

    Args:
        transform: of a batch of inputs, on the CPU.
        model: takes what it returns.
    """

    def __init__(self, transform: Transform | None, model: nn.Module) -> None:
        self.transform, self.model = transform, model
        self._tried = False

    def __call__(self, inputs: Any, size: int) -> Any:
        """The batch as it is trained on.

        Args:
            size: samples of the batch.

        Raises:
            TypeError, ValueError: it is no batch of as many inputs, or not what the network takes.
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
        if not self._tried:
            self._try(inputs)
            self._tried = True
        return inputs

    @torch.no_grad()
    def _try(self, inputs: Any) -> None:
        device = next(self.model.parameters()).device
        with taking("transform", inputs, self.model), evaluating(self.model):
            forward_logits(self.model, move(pick(inputs, slice(2)), device))
