"""Where and how exactly a run computes: device, precision of the forward pass, loss scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fast.train.precision import autocast_dtype


class Engine:
    """One device.

    Args:
        device: of the network.
        precision: an option of `TrainConfig`; "fp16" scales the loss.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.dtype = autocast_dtype(precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)
