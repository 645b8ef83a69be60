"""Pairs of a real pretrained network and a real target task, read from a data folder.

The folder is not part of the project. It holds `weights/*.safetensors`, `images/*.npz`,
`text/*.json.gz` and `code/`, the plain PyTorch definitions of the networks and the file loaders.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOURCE_SAMPLES = 1000
SOURCE_INPUTS = 500
VAL_SAMPLES = 1000
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Split = tuple[Any, Tensor]


@dataclass(frozen=True)
class Job:
    """One adaptation: the pretrained network, target data, and what measures the source task.

    Attributes:
        source: held-out source data, or a function of the model that returns an accuracy.
        source_inputs: a few hundred other source inputs, to protect the source with; never the
            ones that measure.
        source_labels: theirs, where the source skill is nothing without.
    """

    model: nn.Module
    train: Split
    val: Split
    source: Split | Callable[[nn.Module], float]
    source_inputs: Any
    source_labels: Tensor | None = None


class Folder:
    """Reads networks and data from the data folder."""

    _images: ClassVar[dict[tuple[str, str, int | None, bool], Split]] = {}

    def __init__(self, path: Path) -> None:
        if not (path / "code").is_dir():
            raise FileNotFoundError(f"{path} is no data folder: it has no code/")
        self.path = path
        sys.path.insert(0, str(path / "code"))

    def module(self, name: str) -> Any:
        return importlib.import_module(name)

    def weights(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        state = load_file(self.path / "weights" / f"{name}.safetensors")
        return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}

    def images(self, name: str, split: str, size: int | None, cifar: bool) -> Split:
        """Images `[N, 3, H, W]`, normalised as the network was trained, and labels."""
        # Once per process: the larger sets take longer to decode than a run on a GPU takes.
        key = (name, split, size, cifar)
        if key not in self._images:
            self._images[key] = self._read_images(*key)
        return self._images[key]

    def _read_images(self, name: str, split: str, size: int | None, cifar: bool) -> Split:
        x, y, _ = self.module("load").images(self.path / "images" / f"{name}.npz", split, size)
        x = torch.from_numpy(x)
        if x.dim() == 3:
            x = x[..., None].expand(-1, -1, -1, 3)
        x = x.permute(0, 3, 1, 2).float()
        if not cifar:
            return (x - 128) / 128, torch.from_numpy(y)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (x / 255 - mean) / std, torch.from_numpy(y)

    def texts(self, name: str, split: str, limit: int | None = None) -> Split:
        """Token ids and mask `[N, T]` as a mapping, and labels."""
        texts, y, _ = self.module("load").text(self.path / "text" / f"{name}.json.gz", split)
        labels = torch.from_numpy(y)
        keep = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:limit]
        pieces = self.module("minilm").WordPiece(self.path / "weights" / "minilm_vocab.txt")
        ids, mask = pieces.batch([texts[i] for i in keep.tolist()], 48)
        return {"ids": ids, "mask": mask}, labels[keep]


def _cifar(depth: int, target: str, folder: Folder) -> Job:
    model = folder.module("cifar_resnet").CifarResNet(depth)
    model.load_state_dict(folder.weights(f"cifar_resnet{depth}"), strict=False)
    x, y = folder.images("cifar10_part", "test", None, True)
    asked, right = folder.images(target, "test", 32, True)
    return Job(
        model,
        folder.images(target, "train", 32, True),
        (asked[:VAL_SAMPLES], right[:VAL_SAMPLES]),
        (x[:SOURCE_SAMPLES], y[:SOURCE_SAMPLES]),
        folder.images("cifar10_part", "train", None, True)[0][:SOURCE_INPUTS],
    )


def _mobilenet(width: float, folder: Folder) -> nn.Module:
    model = folder.module("mobilenet_v1").MobileNetV1(width)
    size = {0.25: 128, 0.5: 160}[width]
    model.load_state_dict(folder.weights(f"mobilenet_v1_{width}_{size}"))
    return model


def _efficientnet(folder: Folder) -> nn.Module:
    model = folder.module("efficientnet_lite").EfficientNetLite(0)
    model.load_state_dict(folder.weights("efficientnet_lite0_fp16"), strict=False)
    return model


def _imagenet(
    network: Callable[[Folder], nn.Module], target: str, size: int, folder: Folder
) -> Job:
    x, y = folder.images("imagenet_samples500_192jpeg", "test", size, False)
    asked, right = folder.images(target, "test", size, False)
    return Job(
        network(folder),
        folder.images(target, "train", size, False),
        (asked[:VAL_SAMPLES], right[:VAL_SAMPLES]),
        # One image of each of 500 classes: half to measure with, half to protect with.
        (x[::2], y[::2]),
        x[1::2],
    )


class SentenceClassifier(nn.Module):
    """MiniLM's mean-pooled sentence vector and a linear head; two inputs.

    Batches are cut to their longest text: half the work where all are padded to the longest of all.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(384, num_classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.fc(self.encode(ids, mask))

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())
        return self.encoder.encode(ids[:, :longest], mask[:, :longest])  # type: ignore[operator]


class NearestClassMean:
    """The source skill of a network without a source head: texts fall to the nearest class mean."""

    def __init__(self, known: Split, asked: Split) -> None:
        self.known, self.asked = known, asked

    def __call__(self, model: nn.Module) -> float:
        def vectors(x: dict[str, Tensor]) -> Tensor:
            device = next(model.parameters()).device
            parts = zip(x["ids"].split(100), x["mask"].split(100), strict=True)
            encoded = [model.encode(i.to(device), m.to(device)) for i, m in parts]  # type: ignore[operator]
            return F.normalize(torch.cat(encoded), dim=1).cpu()

        (x, y), (asked, right) = self.known, self.asked
        features, classes = vectors(x), int(y.max()) + 1
        means = torch.stack([features[y == c].mean(0) for c in range(classes)])
        answers = torch.cdist(vectors(asked), F.normalize(means, dim=1)).argmin(1)
        return (answers == right).float().mean().item()


def _minilm(target: str, skill: str, known_texts: int, folder: Folder) -> Job:
    encoder = folder.module("minilm").MiniLM()
    encoder.load_state_dict(folder.weights("minilm_l6_fp16"))
    train = folder.texts(target, "train")
    known = folder.texts(skill, "train", known_texts)
    return Job(
        SentenceClassifier(encoder, int(train[1].max()) + 1),
        train,
        folder.texts(target, "test", 500),
        NearestClassMean(known, folder.texts(skill, "test", 500)),
        {name: rows[:SOURCE_INPUTS] for name, rows in known[0].items()},
        known[1][:SOURCE_INPUTS],
    )


@dataclass(frozen=True)
class Pair:
    make: Callable[[Folder], Job]
    steps: int
    eval_every: int = 10


PAIRS: dict[str, Pair] = {
    "resnet20 -> sign_digits": Pair(lambda f: _cifar(20, "sign_digits_32", f), 150),
    "resnet20 -> gtsrb": Pair(lambda f: _cifar(20, "gtsrb_part", f), 150),
    "resnet32 -> fashion_mnist": Pair(lambda f: _cifar(32, "fashion_mnist_part", f), 150),
    "mobilenet 0.25 -> flowers": Pair(
        lambda f: _imagenet(lambda g: _mobilenet(0.25, g), "flowers5_96jpeg", 128, f), 100
    ),
    "minilm -> banking77": Pair(lambda f: _minilm("banking77", "sst2", 300, f), 60, 12),
    "minilm -> sst2": Pair(lambda f: _minilm("sst2", "banking77", 600, f), 60, 12),
    # Nothing was chosen by these.
    "efficientnet lite0 -> flowers": Pair(
        lambda f: _imagenet(_efficientnet, "flowers5_96jpeg", 96, f), 60
    ),
    "mobilenet 0.5 -> gtsrb": Pair(
        lambda f: _imagenet(lambda g: _mobilenet(0.5, g), "gtsrb_part", 96, f), 100
    ),
    "resnet44 -> flowers": Pair(lambda f: _cifar(44, "flowers5_96jpeg", f), 100),
    "minilm -> sms_spam": Pair(lambda f: _minilm("sms_spam", "banking77", 600, f), 40, 10),
}
