"""How fast image files become batches, against a bare torchvision `ImageFolder` in a DataLoader.

    python -m benchmarks.data.decoding [--images 400] [--workers 0,2]

Both read the same JPEGs (500x375, made here), as at evaluation (the preset of a ResNet) and
as in training (random crop, mirror), in batches of 64, with as many workers. They take turns, and
printed are the median rates and the median of the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.common import Record, commit, machine, save, table
from fast.data.dataset import Data
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import prepared_by
from fast.data.images.preprocessing import from_preset
from fast.data.sources import load_data
from fast.data.stream import TrainBatches
from tests.torchvision_ops import declare

BATCH = 64


def photographs(folder: Path, count: int) -> None:
    """JPEGs with as much detail as photographs have, in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        path = folder / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def seconds(batches: Iterable[Any], count: int) -> float:
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch[1])
        if seen >= count:
            break
    return time.perf_counter() - start


def readers(folder: Path, training: bool, workers: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """Functions that begin an epoch, by whose it is."""
    from torchvision.datasets import ImageFolder
    from torchvision.models import ResNet18_Weights
    from torchvision.transforms import v2

    preset = ResNet18_Weights.DEFAULT.transforms()
    form: ImageFormat = from_preset(preset, "torchvision").format(3)
    split = load_data(str(folder)).train
    assert split is not None
    ours = Data(
        name="train", dataset=prepared_by(split, form, "light" if training else "none"),
        workers=workers,
    )  # fmt: skip
    bare = [
        v2.RandomResizedCrop(224, scale=(0.5, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preset.mean, preset.std),
    ]
    theirs = ImageFolder(str(folder), v2.Compose(bare) if training else preset)
    loader: DataLoader[Any] = DataLoader(theirs, BATCH, shuffle=training, num_workers=workers)
    if training:
        return {
            "fast": lambda: TrainBatches(ours, BATCH, 0).from_step(0),
            "torchvision": lambda: loader,
        }
    return {"fast": lambda: ours.eval_batches(BATCH), "torchvision": lambda: loader}


def measured(folder: Path, count: int, training: bool, workers: int, rounds: int) -> Record:
    both = readers(folder, training, workers)
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(rounds + 1):
        for name, begin in both.items():
            times[name].append(seconds(begin(), count))
    for values in times.values():
        values.pop(0)  # the first round fills the file cache
    ratios = [t / f for f, t in zip(times["fast"], times["torchvision"], strict=True)]
    return {
        "what": "training" if training else "evaluation",
        "workers": workers,
        "fast, images/s": f"{count / median(times['fast']):.0f}",
        "torchvision, images/s": f"{count / median(times['torchvision']):.0f}",
        "ratio": f"{median(ratios):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    declare()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder, args.images)
        rows = [
            measured(folder, args.images, training, workers, args.rounds)
            for workers in map(int, args.workers.split(","))
            for training in (False, True)
        ]
    note = f"{args.images} JPEGs of 500x375, batches of {BATCH}; {machine()}; commit {commit()}."
    save("decoding", [*table(rows), "", note])


if __name__ == "__main__":
    main()
