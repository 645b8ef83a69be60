"""How fast image files become batches, against a bare torchvision `ImageFolder` in a DataLoader.

    python -m benchmarks.data.decoding [--images 96] [--workers 0,2]

Both read the same JPEGs (500x375, made here), as at evaluation (the preset of a ResNet) and
as in training (random crop, mirror), in batches of 32, with as many workers. They take turns.
Printed are the median rate by the clock, the median time of the processor, workers included, and
the medians of the ratios of turns that follow each other. Above 1 this loader is the faster one.
What else runs on a machine disturbs the clock more than it does the time of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.common import RESULTS, Record, commit, machine, save, table
from fast.data.dataset import Data
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import prepared_by
from fast.data.images.preprocessing import from_preset
from fast.data.sources import load_data
from fast.data.stream import row_batches, view_seed
from tests.torchvision_ops import declare

BATCH = 32


def photographs(folder: Path, count: int) -> None:
    """JPEGs with as much detail as photographs have, in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        path = folder / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def spent(begin: Callable[[], Iterable[Any]], count: int) -> tuple[float, float]:
    """Seconds until so many images were read, and seconds of the processor for them."""
    before, start, seen = sum(os.times()[:4]), time.perf_counter(), 0
    batches: Any = iter(begin())
    for batch in batches:
        seen += len(batch[1])
        if seen >= count:
            break
    seconds = time.perf_counter() - start
    if hasattr(batches, "close"):
        batches.close()
    del batches  # ends the workers, whose time is counted then
    return seconds, sum(os.times()[:4]) - before


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
    count = len(split)

    def epoch() -> Iterable[Any]:
        """The batches of an epoch as `TrainBatches` asks for them. It goes on without end, and
        would count what workers read ahead."""
        batches = islice(row_batches(count, BATCH, seed=0), count // BATCH)
        return ours.batches_at(
            (rows, [view_seed(0, 0, row) for row in rows.tolist()]) for rows in batches
        )

    if training:
        return {"fast": epoch, "torchvision": lambda: loader}
    return {"fast": lambda: ours.eval_batches(BATCH), "torchvision": lambda: loader}


def measured(folder: Path, count: int, training: bool, workers: int, rounds: int) -> Record:
    both = readers(folder, training, workers)
    turns: list[dict[str, tuple[float, float]]] = []
    for i in range(rounds + 1):
        order = list(both.items())[:: -1 if i % 2 else 1]
        turns.append({name: spent(begin, count) for name, begin in order})
    turns.pop(0)  # the first round fills the file cache
    cells: Record = {"what": "training" if training else "evaluation", "workers": workers}
    for place, measure in enumerate(("clock", "processor")):
        for name in both:
            seconds = median(turn[name][place] for turn in turns)
            rate = f"{count / seconds:.0f} images/s"
            cost = f"{1e3 * seconds / count:.1f} ms"
            cells[f"{name}, {measure}"] = cost if place else rate
        ratio = median(turn["torchvision"][place] / turn["fast"][place] for turn in turns)
        cells[f"ratio, {measure}"] = f"{ratio:.2f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--rounds", type=int, default=21)
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
    facts = {
        "images": args.images,
        "rounds": args.rounds,
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow")},
        "load": os.getloadavg()[1],
        "commit": commit(),
    }
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    save("decoding", [
        *table(rows), "",
        f"{args.images} JPEGs of 500x375, batches of {BATCH}, {args.rounds} rounds; "
        f"{facts['machine']}, load {facts['load']:.0f}; {versions}; commit {facts['commit']}.",
    ])  # fmt: skip
    (RESULTS / "decoding.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
