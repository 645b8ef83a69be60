"""What a resumed run could not see by its weights and tensors: compared, restored or warned of."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fast
from fast.data.reachable import code_of, reachable, values_of
from helpers import same_state
from interruption import Stopped, dying_at
from networks import images

X, Y = images(96, 4, seed=1)
OPTIONS = {"num_classes": 4, "steps": 12, "eval_every": 4, "batch_size": 16, "progress": False}
shared = np.random.default_rng(0)


class Net(nn.Module):
    def __init__(self, rate=0.2, act=torch.relu):
        super().__init__()
        torch.manual_seed(0)
        self.rate, self.act = rate, act
        self.flat, self.body, self.fc = nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(F.dropout(self.act(self.body(self.flat(x))), self.rate, self.training))


class Tanh(Net):
    def forward(self, x):
        return self.fc(F.dropout(torch.tanh(self.body(self.flat(x))), self.rate, self.training))


class Samples(Dataset):
    def __init__(self, scale=1.0, shift=0, noise=None):
        self.scale, self.shift, self.noise = scale, shift, noise

    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        added = self.noise() if self.noise else 0.0
        return X[i] * self.scale + added, (int(Y[i]) + self.shift) % 4


def flip(x):
    return x.flip(-1)


def scaled(x, by=1.0):
    return x * by


def run(model=None, train=(X, Y), **options):
    """The weights after a run."""
    return fast.finetune(model or Net(), train, **OPTIONS, **options).model.state_dict()


def interrupted(model=None, train=(X, Y), *, at, **options):
    """A run that dies when it has taken step `at`."""
    with dying_at(at), pytest.raises(Stopped):
        run(model, train, **options)


OTHERS = {
    "a transform where there was none": ({}, {"transform": flip}, "transform None, here 'flip'"),
    "another transform": ({"transform": flip}, {"transform": scaled}, "transform 'flip', here 'sc"),
    "another lambda": (
        {"transform": lambda x: x + 1},
        {"transform": lambda x: x + 2},
        "the transform's code",
    ),
    "halved inputs": ({"train": Samples()}, {"train": Samples(0.5)}, "training data"),
    "shifted labels": ({"train": Samples()}, {"train": Samples(shift=1)}, "training data"),
    "in a loader": (
        {"train": DataLoader(Samples(), 16)},
        {"train": DataLoader(Samples(0.5), 16)},
        "training data",
    ),
    "of validation": ({"val": Samples()}, {"val": Samples(0.5)}, "validation data"),
    "another forward": ({}, {"model": Tanh()}, "the network's"),
    "another dropout rate": ({}, {"model": Net(0.3)}, "the network's settings"),
    "another activation": ({}, {"model": Net(act=lambda x: x.relu())}, "the network's settings"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_makes_another_run_is_refused(tmp_path, name):
    first, then, message = OTHERS[name]
    interrupted(**{"model": Net(), **first}, at=7, output=tmp_path)
    with pytest.raises(ValueError, match=f"of another job: {message}"):
        run(**{"model": Net(), **then}, resume=tmp_path)
    run(**({"model": Net()} | {k: v for k, v in first.items() if k != "model"}), resume=tmp_path)


@pytest.mark.parametrize("kind", ["threads", "version", "values"])
def test_another_environment_is_one_warning(tmp_path, monkeypatch, kind):
    transform = functools.partial(scaled, by=1.0)
    interrupted(transform=transform, at=7, output=tmp_path)
    if kind == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    elif kind == "version":
        monkeypatch.setattr("fast.version.__version__", "9.9")
    else:
        transform = functools.partial(scaled, by=0.5)
    message = {"threads": "threads 1, here 7", "version": "fast .*, here 9.9", "values": "values"}
    with pytest.warns(UserWarning, match=f"the run was saved with {message[kind]}"):
        run(transform=transform, resume=tmp_path)


class Noise:
    """An augmentation with a generator of its own, at some depth."""

    def __init__(self, generator):
        self.parts = [{"inner": generator}]

    def __call__(self, x=None):
        generator = self.parts[0]["inner"]
        if isinstance(generator, torch.Generator):
            value = float(torch.rand((), generator=generator))
        else:
            value = generator.random()
        return value if x is None else x + value


def closure(generator):
    noise = Noise(generator)
    return lambda x: noise(x)


def from_a_global(x):
    return x + shared.random()


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(5),
    "numpy": lambda: np.random.default_rng(5),
    "mersenne": lambda: np.random.Generator(np.random.MT19937(5)),
    "philox": lambda: np.random.Generator(np.random.Philox(5)),
    "numpy, old": lambda: np.random.RandomState(5),
    "random": lambda: random.Random(5),
}
PLACES = {
    "transform": lambda g: {"transform": closure(g)},
    "partial": lambda g: {"transform": functools.partial(Noise.__call__, Noise(g))},
    "method": lambda g: {"transform": Noise(g).__call__},
    "dataset": lambda g: {"train": Samples(noise=Noise(g))},
    "loader": lambda g: {"train": DataLoader(Samples(noise=Noise(g)), 16, shuffle=True)},
    "val": lambda g: {"val": Samples(noise=Noise(g))},
    "network": lambda g: {"model": Net(act=lambda x: Noise(g)(x).relu())},
}


@pytest.mark.parametrize(("kind", "place"), [(k, "transform") for k in GENERATORS] + [
    ("numpy", p) for p in PLACES if p != "transform"])  # fmt: skip
def test_generators_of_the_data_go_on(tmp_path, kind, place):
    def options():
        return {"model": Net(), **PLACES[place](GENERATORS[kind]())}

    whole = run(**options(), output=tmp_path / "whole")
    interrupted(**options(), at=10, output=tmp_path / "cut")
    again = run(**options(), resume=tmp_path / "cut")
    assert same_state(again, whole)


def test_a_generator_that_is_a_global(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "shared", np.random.default_rng(0))
    whole = run(transform=from_a_global)
    monkeypatch.setitem(globals(), "shared", np.random.default_rng(0))
    interrupted(transform=from_a_global, at=10, output=tmp_path)
    monkeypatch.setitem(globals(), "shared", np.random.default_rng(3))
    again = run(transform=from_a_global, resume=tmp_path)
    assert same_state(again, whole)


def test_where_samples_are_read_the_run_is_the_same(tmp_path):
    """A folder makes the run read samples to compare; without one it does not."""
    a = run(train=Samples(noise=Noise(np.random.default_rng(5))))
    b = run(train=Samples(noise=Noise(np.random.default_rng(5))), output=tmp_path)
    assert same_state(a, b)


def test_another_generator_is_refused(tmp_path):
    make = GENERATORS["numpy"]
    interrupted(transform=closure(make()), at=7, output=tmp_path)

    def plain(generator):
        noise = Noise(None)
        return lambda x: noise(x)

    with pytest.raises(ValueError, match="of another job"):
        run(transform=plain(make()), resume=tmp_path)


def test_code_does_not_depend_on_where_it_is_written():
    space = {}
    texts = ["def f(x):\n    return x + 1", "\n\ndef f(x):  # moved\n    return x + 1"]
    hashes = []
    for text in texts:
        exec(text, space)
        hashes.append(code_of(root=space["f"]))
    exec("def f(x):\n    return x + 2", space)
    assert hashes[0] == hashes[1] != code_of(root=space["f"])


def test_circles_end_and_values_are_found():
    ring: list = [1.5]
    ring.append({"back": ring, "deep": ("x",)})
    assert [v for _, v in reachable(root=ring) if isinstance(v, (float, str))] == [1.5, "x"]
    changed: list = [1.5]
    changed.append({"back": changed, "deep": ("y",)})
    assert values_of(root=ring) != values_of(root=changed)
