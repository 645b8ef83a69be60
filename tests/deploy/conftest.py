"""One adapted network with batch norms per task, in memory and in a folder."""

from types import SimpleNamespace

import pytest
import torch

import fast
from networks import ConvNet, images

X, Y = images(96, 4, seed=1)
SOURCE = images(50, 5, seed=2)


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    """`result`, the `folder` it was saved in, and its data."""
    torch.manual_seed(0)
    kept = images(24, 5, seed=3)[0]
    result = fast.finetune(
        ConvNet(), (X, Y), (X, Y), SOURCE, steps=6, lr=1e-2, source_inputs=kept, device="cpu"
    )
    result.classes = ["ant", "bee", "cat", "dog"]
    folder = tmp_path_factory.mktemp("adapted") / "run"
    result.save(folder)
    return SimpleNamespace(result=result, folder=folder, x=X, y=Y, source=SOURCE)
