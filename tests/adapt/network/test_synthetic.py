"""Inputs made from batch norms: closer to training than noise, reproducible, and refused where
nothing could come of them."""

from __future__ import annotations

import copy
import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from fast.adapt.network import synthetic

CLASSES = 3


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures `[N, 2, 6, 6]` of classes that differ in brightness, contrast and colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 2, 6, 6, generator=generator)
    scale = (1.0 + labels)[:, None, None, None]
    shift = torch.stack([labels - 1.0, 1.0 - labels], 1)[:, :, None, None]
    return noise * scale / 3 + 3 * shift, labels


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


def trained(model: nn.Module, inputs: Tensor, labels: Tensor, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net(), *blobs(150, seed=0))


def divergence(model: nn.Module, inputs: Tensor) -> float:
    return synthetic._own_divergence(model, synthetic._norms(model), inputs)


def test_they_are_like_training_data_to_the_network(pretrained: nn.Module) -> None:
    """They begin as noise here, of which there are fewer than are made."""
    like = torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 2
    made = fast.synthetic_inputs(pretrained, like, count=96, own=0, steps=60)
    assert made.shape == (96, 2, 6, 6)
    assert made.dtype == like.dtype
    assert not made.requires_grad
    assert like.min() <= made.min()
    assert made.max() <= like.max()
    real = divergence(pretrained, blobs(60, seed=2)[0])
    assert divergence(pretrained, made) < 0.3 * divergence(pretrained, like) + real
    with torch.no_grad():
        answers = pretrained.eval()(made).softmax(1)
    assert answers.max(1).values.mean() > 0.8
    counts = answers.argmax(1).bincount(minlength=CLASSES)
    assert counts.min() > 96 / CLASSES / 2  # of all classes


def test_the_network_and_the_random_numbers_stay(pretrained: nn.Module) -> None:
    pretrained.train()
    pretrained.zero_grad()
    before = copy.deepcopy(pretrained.state_dict())
    state = torch.get_rng_state()
    first = fast.synthetic_inputs(pretrained, blobs(8, 0)[0], count=8, steps=3)
    again = fast.synthetic_inputs(pretrained, blobs(8, 0)[0], count=8, steps=3)
    other = fast.synthetic_inputs(pretrained, blobs(8, 0)[0], count=8, steps=3, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert pretrained.training
    assert all(torch.equal(x, before[name]) for name, x in pretrained.state_dict().items())
    assert all(p.grad is None for p in pretrained.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in pretrained.modules())


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)), (5,)),
        ((nn.Conv1d(2, 7, 3), nn.BatchNorm1d(7), nn.ReLU(), nn.Conv1d(7, 3, 1)), (2, 9)),
        ((nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 3)), (1, 3, 3, 3)),
    ],
    ids=["vectors", "positions", "volumes"],
)
def test_any_shape(layers: tuple[nn.Module, ...], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, like = nn.Sequential(*layers), torch.randn(20, *shape, dtype=torch.float64)
    model.double()(like)  # the norms have seen something
    made = fast.synthetic_inputs(model, like, count=70, own=0, steps=5)
    assert made.shape == (70, *shape)
    assert made.dtype == torch.float64
    noise = divergence(model, torch.randn(70, *shape, dtype=torch.float64) * 3)
    assert divergence(model, made) < noise


def test_the_log_compares_them_with_the_targets_own(
    pretrained: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fast"):
        fast.synthetic_inputs(pretrained, blobs(20, 0)[0], count=6, own=2, steps=2)
    assert "6 synthetic inputs and 2 own ones;" in caplog.text


def test_a_share_of_them_are_own_inputs(pretrained: nn.Module) -> None:
    """In random order: half of source inputs are held back where there is a budget."""
    own = blobs(20, 0)[0]

    def same(inputs: Tensor) -> Tensor:
        return (inputs[:, None] == own[None]).flatten(2).all(2).any(1)

    own_rows = same(fast.synthetic_inputs(pretrained, own, count=30, own=15, steps=2))
    assert (len(own_rows), own_rows.sum()) == (45, 15)
    assert 0 < own_rows[:22].sum() < 15
    assert same(fast.synthetic_inputs(pretrained, own, count=30, own=60, steps=2)).sum() == 20
    assert same(fast.synthetic_inputs(pretrained, own, count=30, steps=2)).sum() == 3  # a tenth


def test_an_adaptation_keeps_their_features(pretrained: nn.Module) -> None:
    model = copy.deepcopy(pretrained)
    x = torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    made = fast.synthetic_inputs(model, x, count=32, steps=20)
    old, labels = blobs(60, seed=4)
    result = fast.finetune(
        model, (x, torch.arange(40) % 2), None, (old, labels), source_inputs=made,
        steps=12, batch_size=16, progress=False,
    )  # fmt: skip
    assert result.plan is not None
    assert result.plan.rehearsed == "source inputs"
    assert result.source_accuracy is not None
    assert result.source_accuracy_before is not None
    assert result.source_accuracy > result.source_accuracy_before - 0.2


def adapted() -> nn.Module:
    return fast.replace_head(Net(), num_classes=2, sample=blobs(8, 0)[0])


def broken() -> nn.Module:
    model = Net()
    model.norm2.running_var.fill_(torch.nan)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize(
    ("model", "like", "options", "error", "match"),
    [
        (Net, torch.zeros(4, 2, 6, 6, dtype=torch.int64), {}, TypeError, "floating-point"),
        (Net, [1, 2], {}, TypeError, "got list"),
        (Net, torch.zeros(1, 2, 6, 6), {}, ValueError, "start has 1 inputs"),
        (Net, torch.zeros(4, 3, 6, 6), {}, ValueError, "start: the network does not take"),
        (Net, blobs(8, 0)[0], {"count": 3}, ValueError, "count=3"),
        (Net, blobs(8, 0)[0], {"steps": 0}, ValueError, "steps=0"),
        (Net, blobs(8, 0)[0], {"own": 0.5}, ValueError, "own=0.5"),
        (Net, torch.zeros(4, 2, 6, 6), {}, ValueError, "start: all inputs are the same number"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)),
            blobs(8, 0)[0],
            {},
            ValueError,
            "no batch norm with running statistics",
        ),
        (adapted, blobs(8, 0)[0], {}, ValueError, "adapted already"),
        (broken, blobs(8, 0)[0], {"steps": 2}, ValueError, "not finite"),
    ],
)
def test_what_is_refused(model, like, options, error, match) -> None:
    with pytest.raises(error, match=match):
        fast.synthetic_inputs(model(), like, **options)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: nn.Module) -> None:
    page = Path(__file__).parents[3] / "docs" / "no-source-data.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fast, "synthetic_inputs", partial(fast.synthetic_inputs, steps=3))
    x, labels = torch.randn(30, 2, 6, 6), torch.arange(30) % 2
    names = {"model": copy.deepcopy(pretrained), "x": x, "y": labels, "val": (x, labels)}
    exec(block, names | {"source": blobs(20, 0), "steps": 2})
    assert torch.load(tmp_path / "made.pt").shape == (256 + 26, 2, 6, 6)
