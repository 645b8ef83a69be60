"""One small job on disk: a network file, its pretrained weights, target and source data."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fast.cli import main

NETS = '''
from torch import nn


class Net(nn.Module):
    """For 8x8 grey images."""
    mean = std = 0.5
    def __init__(self, classes=3, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.fc = nn.Linear(16 * width, classes)

    def forward(self, x):
        return self.fc(self.pool(self.norm(self.conv(x)).relu()).flatten(1))


def headless():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
'''


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory):
    """The key that signs runs is not the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Too small for two: with other processes on the cores these tests took 10 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spots(count, classes, seed, row):
    """uint8 `[count, 8, 8]`: noise, and a bright spot in this row; the class is its column."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[row : row + 2, 2 * label : 2 * label + 2] += 130
    return images, labels


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "nets.py").write_text(NETS)
    space = {}
    exec(NETS, space)
    images, labels = spots(300, 3, seed=0, row=0)
    x = ((torch.from_numpy(images) / 255 - 0.5) / 0.5)[:, None]
    y = torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: nn.Module = space["Net"]()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for index in torch.arange(300).repeat(10).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    save_file(net.state_dict(), folder / "net.safetensors")
    np.savez(folder / "source.npz", **named(spots(90, 3, seed=1, row=0), "test"))
    train, test = spots(200, 4, seed=2, row=4), spots(80, 4, seed=3, row=4)
    np.savez(folder / "target.npz", **named(train, "train"), **named(test, "test"))
    return folder


def named(data, split):
    return {f"x_{split}": data[0], f"y_{split}": data[1]}


@pytest.fixture(scope="session")
def job_args():
    files = ["--weights", "net.safetensors", "--data", "target.npz", "--source", "source.npz"]
    return ["--model", "nets.py:Net(3)", *files, "--batch-size", "32"]


@pytest.fixture
def job(pretrained, job_args, tmp_path, capsys, monkeypatch):
    """`job.fast(*args)` -> (exit code, stdout, stderr), in a folder of its own."""
    for file in pretrained.glob("*.*"):
        shutil.copy2(file, tmp_path)
    monkeypatch.chdir(tmp_path)

    def fast(*args):
        code = main([str(a) for a in args])
        return code, *capsys.readouterr()

    return SimpleNamespace(fast=fast, folder=tmp_path, args=job_args)
