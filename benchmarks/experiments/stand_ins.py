"""What stands in for source pictures that nobody has, made of ten target pictures of each class.

    python -m benchmarks.experiments.stand_ins --data FOLDER

512 of each kind are given to `fast` as source inputs, where one function answers both tasks (the
defaults keep fewer of them, and some of the target's own). Finished runs are kept in
`benchmarks/results/stand_ins.jsonl` and not run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from benchmarks.common import (
    Record,
    arguments,
    complete,
    learned_and_lost,
    machine,
    save_learned_and_lost,
)
from benchmarks.finetune.regimes.baselines import finetune
from benchmarks.finetune.regimes.samples import Task
from fast.data.images.patches import shuffled_patches

PAIRS = "resnet20 -> sign_digits,mobilenet 0.25 -> flowers,mobilenet 0.25 -> trashnet"
SAMPLES, COUNT = 10, 512
ZOOM, SHIFT, COLOURS = 2.0, 0.5, 0.6


def some_of(x: Tensor, generator: Generator) -> Tensor:
    return x[torch.randint(len(x), (COUNT,), generator=generator)]


def mixed(x: Tensor, generator: Generator) -> Tensor:
    """Sums of two pictures, in random proportion."""
    share = torch.rand(COUNT, 1, 1, 1, generator=generator)
    return share * some_of(x, generator) + (1 - share) * some_of(x, generator)


def random_phase(x: Tensor, generator: Generator) -> Tensor:
    """Noise that has the spectrum of a picture in each channel."""
    noise = torch.fft.fft2(torch.randn(COUNT, 1, *x.shape[2:], generator=generator))
    return torch.fft.ifft2(torch.fft.fft2(some_of(x, generator)) * noise / noise.abs()).real


def distorted(x: Tensor, generator: Generator) -> Tensor:
    """Pictures turned by any angle, at up to twice or half of their size, in other colours."""
    angle, size, *shift = torch.rand(4, COUNT, generator=generator) * 2 - 1
    angle, size = angle * math.pi, ZOOM**size
    rows = [angle.cos() * size, -angle.sin() * size, shift[0] * SHIFT]
    rows += [angle.sin() * size, angle.cos() * size, shift[1] * SHIFT]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [COUNT, *x.shape[1:]], False)
    y = F.grid_sample(some_of(x, generator), grid, padding_mode="reflection", align_corners=False)
    colours = torch.eye(3) + COLOURS * torch.randn(COUNT, 3, 3, generator=generator)
    return torch.einsum("nij,njhw->nihw", colours, y).clamp(x.amin(), x.amax())


KINDS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "the pictures themselves": some_of,
    "mixtures of two": mixed,
    "noise of their spectrum": random_phase,
    "distorted": distorted,
    "shuffled patches": lambda x, generator: shuffled_patches(x, COUNT, generator),
}


def run(*, pair: str, kind: str, data: Path) -> Record:
    torch.manual_seed(0)
    task = Task(pair, data, samples=SAMPLES, seed=0)
    made = KINDS[kind](task.train[0], torch.Generator().manual_seed(0))
    record = finetune(task, steps=task.real.steps, source_inputs=made, batch_norm="frozen")
    return record | {"machine": machine()}


def main() -> None:
    args = arguments(__doc__, PAIRS).parse_args()
    settings = [{"pair": pair, "kind": kind} for kind in KINDS for pair in args.pairs.split(",")]
    records = complete("stand_ins", run, settings, data=args.data.resolve())
    rows: dict[str, Record] = {kind: {"source inputs": kind} for kind in KINDS}
    for r in records:
        rows[r["kind"]][r["pair"]] = learned_and_lost(r)
    save_learned_and_lost("stand_ins", __doc__, rows.values(), records)


if __name__ == "__main__":
    main()
