"""Pairs of a real pretrained network and a real target task: `real_pair(name, data_folder)`.

The data folder is not part of the project. It holds `weights/*.safetensors`, `images/*.npz`,
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


@dataclass(frozen=True, kw_only=True)
class RealPair:
    """A pretrained network, target data, and what measures the source task.

    Attributes:
        source: held-out source data, or a function of the model that returns an accuracy.
        source_inputs: a few hundred other source inputs, to protect the source with; they never
            measure it.
        source_labels: the labels of `source_inputs`, where the source skill cannot do without.
        steps: the length of a run.
        eval_every: steps between two evaluations.
    """

    model: nn.Module
    train: Split
    val: Split
    source: Split | Callable[[nn.Module], float]
    source_inputs: Any
    source_labels: Tensor | None = None
    steps: int
    eval_every: int = 10

    @property
    def num_classes(self) -> int:
        return int(self.train[1].max()) + 1


def real_pair(name: str, data: Path) -> RealPair:
    """The pair of that name, with a model of its own, from the data folder."""
    return PAIRS[name](Folder(data))


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
        # Decoded once per process: for the larger sets it takes longer than a run on a GPU.
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


def _cifar(folder: Folder, depth: int, target: str, steps: int) -> RealPair:
    model = folder.module("cifar_resnet").CifarResNet(depth)
    model.load_state_dict(folder.weights(f"cifar_resnet{depth}"), strict=False)
    x, y = folder.images("cifar10_part", "test", None, True)
    x_val, y_val = folder.images(target, "test", 32, True)
    return RealPair(
        model=model,
        train=folder.images(target, "train", 32, True),
        val=(x_val[:VAL_SAMPLES], y_val[:VAL_SAMPLES]),
        source=(x[:SOURCE_SAMPLES], y[:SOURCE_SAMPLES]),
        source_inputs=folder.images("cifar10_part", "train", None, True)[0][:SOURCE_INPUTS],
        steps=steps,
    )


def _mobilenet(folder: Folder, width: float) -> nn.Module:
    model = folder.module("mobilenet_v1").MobileNetV1(width)
    size = {0.25: 128, 0.5: 160}[width]
    model.load_state_dict(folder.weights(f"mobilenet_v1_{width}_{size}"))
    return model


def _efficientnet(folder: Folder) -> nn.Module:
    model = folder.module("efficientnet_lite").EfficientNetLite(0)
    model.load_state_dict(folder.weights("efficientnet_lite0_fp16"), strict=False)
    return model


def _imagenet(folder: Folder, model: nn.Module, target: str, size: int, steps: int) -> RealPair:
    x, y = folder.images("imagenet_samples500_192jpeg", "test", size, False)
    x_val, y_val = folder.images(target, "test", size, False)
    return RealPair(
        model=model,
        train=folder.images(target, "train", size, False),
        val=(x_val[:VAL_SAMPLES], y_val[:VAL_SAMPLES]),
        # One image of each of 500 classes: half to measure with, half to protect with.
        source=(x[::2], y[::2]),
        source_inputs=x[1::2],
        steps=steps,
    )


class SentenceClassifier(nn.Module):
    """MiniLM's mean-pooled sentence vector and a linear head, on two inputs.

    A batch is cut to its longest text, which halves the work: all texts are padded to the longest
    of the data set.
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
    """The source skill of a network without a source head: the class mean nearest to a text.

    Attributes:
        reference: texts and labels that the class means are made of.
        test: texts and labels that the accuracy is measured on.
    """

    def __init__(self, reference: Split, test: Split) -> None:
        self.reference, self.test = reference, test

    def __call__(self, model: nn.Module) -> float:
        def vectors(x: dict[str, Tensor]) -> Tensor:
            device = next(model.parameters()).device
            parts = zip(x["ids"].split(100), x["mask"].split(100), strict=True)
            encoded = [model.encode(i.to(device), m.to(device)) for i, m in parts]  # type: ignore[operator]
            return F.normalize(torch.cat(encoded), dim=1).cpu()

        (x, y), (x_test, y_test) = self.reference, self.test
        features, classes = vectors(x), int(y.max()) + 1
        means = torch.stack([features[y == c].mean(0) for c in range(classes)])
        nearest = torch.cdist(vectors(x_test), F.normalize(means, dim=1)).argmin(1)
        return (nearest == y_test).float().mean().item()


def _minilm(
    folder: Folder, target: str, skill: str, texts: int, steps: int, eval_every: int = 12
) -> RealPair:
    encoder = folder.module("minilm").MiniLM()
    encoder.load_state_dict(folder.weights("minilm_l6_fp16"))
    train = folder.texts(target, "train")
    x, y = reference = folder.texts(skill, "train", texts)
    return RealPair(
        model=SentenceClassifier(encoder, int(train[1].max()) + 1),
        train=train,
        val=folder.texts(target, "test", 500),
        source=NearestClassMean(reference, folder.texts(skill, "test", 500)),
        source_inputs={name: rows[:SOURCE_INPUTS] for name, rows in x.items()},
        source_labels=y[:SOURCE_INPUTS],
        steps=steps,
        eval_every=eval_every,
    )


PAIRS: dict[str, Callable[[Folder], RealPair]] = {
    "resnet20 -> sign_digits": lambda f: _cifar(f, 20, "sign_digits_32", 150),
    "resnet20 -> gtsrb": lambda f: _cifar(f, 20, "gtsrb_part", 150),
    "resnet32 -> fashion_mnist": lambda f: _cifar(f, 32, "fashion_mnist_part", 150),
    "mobilenet 0.25 -> flowers": lambda f: _imagenet(
        f, _mobilenet(f, 0.25), "flowers5_96jpeg", 128, 100
    ),
    "minilm -> banking77": lambda f: _minilm(f, "banking77", "sst2", 300, 60),
    "minilm -> sst2": lambda f: _minilm(f, "sst2", "banking77", 600, 60),
    # No setting was chosen by the pairs from here on.
    "efficientnet lite0 -> flowers": lambda f: _imagenet(
        f, _efficientnet(f), "flowers5_96jpeg", 96, 60
    ),
    "mobilenet 0.5 -> gtsrb": lambda f: _imagenet(f, _mobilenet(f, 0.5), "gtsrb_part", 96, 100),
    "resnet44 -> flowers": lambda f: _cifar(f, 44, "flowers5_96jpeg", 100),
    "minilm -> sms_spam": lambda f: _minilm(f, "sms_spam", "banking77", 600, 40, 10),
    "resnet20 -> omniglot": lambda f: _cifar(f, 20, "omniglot_small", 150),
    "mobilenet 0.25 -> trashnet": lambda f: _imagenet(
        f, _mobilenet(f, 0.25), "trashnet_96jpeg", 128, 100
    ),
    "minilm -> trec6": lambda f: _minilm(f, "trec6", "banking77", 600, 60),
}
# The five that the README reports.
README_PAIRS = (
    "resnet20 -> gtsrb,resnet20 -> sign_digits,resnet32 -> fashion_mnist,"
    "mobilenet 0.25 -> flowers,minilm -> sst2"
)
