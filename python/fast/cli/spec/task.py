"""The network and the data that are named on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fast.cli.options import option
from fast.cli.values import at_least_one, means, share, stds


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A network and its data, by name."""

    model: str | None = option(
        "timm:NAME, torchvision:NAME, transformers:NAME or path/file.py:Factory(args)",
        metavar="SPEC",
        group="model",
    )
    weights: str | None = option(
        "weights of the network: safetensors, or a torch state dict", metavar="FILE", group="model"
    )
    allow_missing: bool = option("weights may lack tensors of the network", False, group="model")
    data: str | None = option(
        "target task: folder of class folders (images, sounds, texts), .csv, .parquet, .npz, or "
        "Hugging Face OWNER/NAME",
        metavar="DATA",
    )
    source: str | None = option(
        "source task, labelled as the network's own head is", metavar="DATA"
    )
    source_inputs: str | None = option(
        "what must be kept: a few hundred other samples of the source task, with labels or without "
        "(a folder of files will do), or what fast synthetic made; the training split is used "
        "where there is one",
        metavar="DATA",
    )
    card: str | None = option(
        "what must be kept, as a fast.SourceCard of these weights", metavar="FILE"
    )
    val_fraction: float = option(
        "share of each class that is held out if there is no val or test split; 0: train on all",
        0.2,
        read=share,
    )
    input_size: int | None = option(
        "side of the images (default: the network's, else as they are)",
        read=at_least_one,
    )
    resize: int | None = option(
        "shorter side of the images before the central square is cut out (default: as the network "
        "was trained, else --input-size)",
        read=at_least_one,
    )
    interpolation: str | None = option(
        "how images are resized (default: the network's way, else bicubic)",
        choices=("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"),
    )
    mean: tuple[float, ...] | None = option(
        "mean of images in 0..1, by channel; or imagenet, or none (default: the network's; needed "
        "where it does not say)",
        read=means,
        metavar="X[,X,X]",
    )
    std: tuple[float, ...] | None = option(
        "standard deviation of images in 0..1, likewise", read=stds, metavar="X[,X,X]"
    )
    skip_broken: bool = option("leave out files that cannot be read, and count them", False)
    flip: bool = option("mirror training images at random", False)
    augment: str = option(
        "random views of training images: none; light (crops of at least half the area, half of "
        "them mirrored); strong (crops of at least a quarter, mirrored, and RandAugment)",
        "none",
        choices=("none", "light", "strong"),
    )
    input_column: str | None = option(
        "column of inputs in a table or Hugging Face data set (default: a guess, which is printed)"
    )
    label_column: str | None = option("column of labels (default: a guess, which is printed)")
    max_length: int = option("tokens of a text; the rest is cut off", 128, read=at_least_one)
    max_seconds: float = option("seconds of a sound; the rest is cut off", 10.0)
    folds: int | None = option(
        "cross-validate: split the data into this many parts, and for each part train on the "
        "others and measure on it; nothing but the accuracies is kept",
        read=at_least_one,
    )

    def __post_init__(self) -> None:
        if self.flip and self.augment != "none":
            raise ValueError(f"--augment {self.augment} mirrors images: drop --flip")
        if self.folds == 1:
            raise ValueError("--folds must be at least 2; got 1")
        if self.folds and self.val_fraction != TaskSpec.val_fraction:
            raise ValueError("--folds holds out each part in turn: drop --val-fraction")
        if not 0 < self.max_seconds <= 3600:
            raise ValueError(f"--max-seconds must be more than 0; got {self.max_seconds:g}")

    @property
    def short_name(self) -> str:
        """Network and data in a word each, for titles and folders.

        `path/nets.py:Net(20)` and `data/signs.npz` -> `Net-signs`.
        """
        return f"{_short(self.model or '')}-{_short(self.data or self.source or '')}"


def _short(name: str) -> str:
    plain = name.split("(")[0].rstrip("/").removeprefix("hf:")
    if plain.startswith(("timm:", "torchvision:", "transformers:")) or ".py:" in plain:
        plain = plain.split(":")[-1]
    return Path(plain).name.removesuffix(".npz").replace(":", "-") or "data"
