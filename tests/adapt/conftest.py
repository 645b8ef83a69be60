"""A small network that knows a task, for the tests of what is kept of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from networks import ConvNet, images


@pytest.fixture(scope="session")
def pretrained():
    """Knows 5 places of a bright blob; not to be changed."""
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = images(300, 5, seed=3)
    for index in torch.arange(300).repeat(20).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()
