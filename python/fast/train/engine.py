"""One device of a run: its part of the network, the precision of its passes, the loss scale."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fast import dtensor
from fast.data.trees import pick
from fast.heads import forward_logits, in_mode, traceless
from fast.models.device import autocast_dtype
from fast.ranks import ALONE, Ranks


class Engine:
    """One device, of this process.

    Args:
        device: the network's device.
        precision: as in `TrainConfig`; "fp16" scales the loss.
        ranks: the processes that train together.

    Attributes:
        network: the network in `DistributedDataParallel`, set by `parallelize`; None for one
            process.
    """

    def __init__(self, device: torch.device, precision: str, ranks: Ranks = ALONE) -> None:
        self.device, self.ranks = device, ranks
        self.network: DistributedDataParallel | None = None
        self.dtype = autocast_dtype(precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def parallelize(self, model: nn.Module, sample: Any) -> None:
        """Average gradients over the ranks from now on; a sharded network does so by itself.

        A trial pass tells whether all parameters get a gradient. It also makes torch settle the
        order of its messages, which it does after the first pass, so that a resumed run rounds its
        sums as an uninterrupted one does.

        Args:
            model: with its new head.
            sample: a batch of its inputs.
        """
        params = list(model.parameters())
        if self.ranks.size == 1 or not any(p.requires_grad for p in params):
            return
        if dtensor.any_sharded(params):
            return
        few = pick(sample, slice(2))
        with in_mode(model, False), traceless(model):
            forward_logits(model, few).float().sum().backward()
            has_unused = any(p.requires_grad and p.grad is None for p in model.parameters())
            self.network = DistributedDataParallel(
                model,
                process_group=self.ranks.group,
                find_unused_parameters=bool(self.ranks.largest(has_unused)),
            )
            for _ in range(2):
                forward_logits(self.network, few).float().sum().backward()
        model.zero_grad()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch: gradients are averaged with the last one of a step."""
        return nullcontext() if self.network is None or last else self.network.no_sync()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)
