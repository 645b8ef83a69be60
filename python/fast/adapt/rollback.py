"""Back to the head start, where training has made the network worse.

The head start is a network of its own: the pretrained backbone with a head that was taught on its
features. With few samples it can be better than all that comes after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fast.adapt.prepare import Drift


class HeadStart:
    """The network before its first step.

    Args:
        model: now.
        drift: keeps the backbone's trained weights as they are now, so that only the rest, the head
            and the statistics, is copied.
    """

    def __init__(self, model: nn.Module, drift: Drift) -> None:
        self.model, self.drift = model, drift
        backbone = {id(p) for p in drift.params}
        self.weights = [
            (p, p.detach().clone())
            for p in model.parameters()
            if p.requires_grad and id(p) not in backbone
        ]
        # By name: a module may put another tensor in a buffer's place.
        self.buffers = [
            (m, name, b.clone())
            for m in model.modules()
            for name, b in m._buffers.items()
            if b is not None
        ]

    def better(self, first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any] | None:
        """Go back where the validation accuracy of the head start was higher.

        Args:
            first, last: records of the head start, and of what the model is now.

        Returns:
            `first` where the model is the head start again, else None.
        """
        if last["target_accuracy"] >= first["target_accuracy"]:
            return None
        self.restore()
        return first

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights and statistics back."""
        pairs = zip(self.drift.params, self.drift.anchors, strict=True)
        for now, before in (*pairs, *self.weights):
            now.copy_(before)
        for module, name, value in self.buffers:
            module._buffers[name] = value.clone()
