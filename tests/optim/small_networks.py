"""The network, the batch and the loop that the tests of the optimizers share."""

from __future__ import annotations

import torch
from torch import nn


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 4, 5)).to(
        dtype
    )


def batch(model: nn.Module) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 6, 6, generator=generator).to(dtype)
    return nn.functional.cross_entropy(model(x), torch.arange(16) % 5)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 12) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        batch(model).backward()
        optimizer.step()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))
