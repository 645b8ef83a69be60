"""The stream of training batches, in an order that can be resumed at any step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fast.data.dataset import Data, read_loader, split_batch
from fast.data.generators import find_generators, held, reseed, seeded
from fast.data.reachable import GENERATORS
from fast.data.trees import pick

EVERYTHING = slice(None)


class TrainBatches:
    """The endless stream of training batches; batch `step` depends on the seed and on `step` alone.

    Every batch is full, and every epoch uses every sample: the shuffled epochs follow each other
    without a seam, so one batch may hold the end of an epoch and the beginning of the next. A
    user's DataLoader keeps its own batches. Seeding torch and the generators of the loader and its
    samplers with (seed, epoch) makes its shuffling repeatable; to resume it, batches that were used
    are read again and dropped.

    Attributes:
        batch_size: samples in a batch: at most all there are; a loader's own number.
        given_size: the loader's own number; None without a loader.
        steps_per_epoch: batches until every sample was used.
    """

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self.data, self.seed = data, seed
        self.given_size: int | None = None
        if data.loader is not None:
            self.steps_per_epoch = len(data.loader)
            size = data.loader.batch_size or getattr(data.loader.batch_sampler, "batch_size", None)
            if not isinstance(size, int):  # a sampler of the user's: the first batch shows its size
                size = len(next(self._loader_batches(data.loader, 0))[1])
            self.batch_size = self.given_size = size
        else:
            self.batch_size = min(batch_size, cast(int, data.num_samples))
            self.steps_per_epoch = self.steps_for(1)

    def steps_for(self, epochs: int) -> int:
        """Batches that use every sample `epochs` times."""
        if self.data.loader is not None:
            return epochs * self.steps_per_epoch
        return math.ceil(epochs * cast(int, self.data.num_samples) / self.batch_size)

    def from_step(
        self, step: int, share: slice = EVERYTHING
    ) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Batches from `step` on: inputs, labels, and row numbers `[B]` (None from a loader).

        Args:
            share: which samples of each batch are wanted. A data set reads only these; a DataLoader
                reads all of them.

        Raises:
            ValueError: a DataLoader gave a batch of fewer samples than there are processes.
        """
        if self.data.loader is not None:
            for inputs, labels, _ in self._loader_batches(self.data.loader, step):
                processes = share.step or 1
                if len(labels) < processes:
                    raise ValueError(
                        f"train: the DataLoader gave a batch of {len(labels)} samples, and "
                        f"{processes} are needed, one for each process: set drop_last=True"
                    )
                if share == EVERYTHING:
                    yield inputs, labels, None
                else:
                    yield pick(inputs, share), labels[share], None
        # Workers ask for the rows of later batches ahead of time.
        ahead, current = itertools.tee(self._keys(step, share))
        for (rows, _), batch in zip(current, self.data.batches_at(ahead), strict=False):
            yield *batch, rows

    def _keys(self, step: int, share: slice) -> Iterator[tuple[Tensor, list[int] | None]]:
        """Row numbers `[B]` of each batch from `step` on. Where samples draw random numbers as they
        are read, each row has a seed, made of the run's seed, the epoch and the row."""
        count = cast(int, self.data.num_samples)
        draws = self.data.has_views or self.data.workers > 0
        for number, batch in enumerate(row_batches(count, self.batch_size, self.seed, step), step):
            places = torch.arange(number * len(batch), (number + 1) * len(batch))[share]
            epochs, rows = (places // count).tolist(), batch[share]
            pairs = zip(epochs, rows.tolist(), strict=True)
            yield rows, [view_seed(self.seed, *pair) for pair in pairs] if draws else None

    def once(self) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """The samples of the first epoch, each once, in the order of `from_step` and as they are;
        the last batch may be smaller."""
        if self.data.loader is not None:
            yield from itertools.islice(self.from_step(0), self.steps_per_epoch)
            return
        count = cast(int, self.data.num_samples)
        rows = _shuffled(count, self.seed, epoch=0).split(self.batch_size)
        batches = self.data.batches_at((index, None) for index in rows)
        for index, batch in zip(rows, batches, strict=True):
            yield *batch, index

    def _loader_batches(
        self, loader: DataLoader[Any], step: int
    ) -> Iterator[tuple[Any, Tensor, None]]:
        epoch, skip = divmod(step, self.steps_per_epoch)
        while True:
            for batch in self._loader_epoch(loader, spread_seed(self.seed, epoch), skip):
                yield *split_batch(batch, self.data.name), None
            epoch, skip = epoch + 1, 0

    def _loader_epoch(self, loader: DataLoader[Any], seed: int, skip: int) -> Iterator[Any]:
        # The sampler draws its seed with the first batch. Neither that nor reading used batches
        # again may move the generators of the run: a resumed run has restored them already.
        generators = find_generators(loader=loader).values() if skip else []
        with seeded(seed), held(generators):
            for owner in _samplers(loader):
                for value in vars(owner).values():
                    if isinstance(value, GENERATORS):
                        reseed(value, seed)
            iterator = read_loader(loader, self.data.name)
            first = next(iterator)
            for _ in range(skip - 1):
                next(iterator)
        if skip == 0:
            yield first
        yield from iterator


def first_inputs(data: Data) -> Any:
    """Inputs of two samples, or of a DataLoader's first batch; no random generator is moved, and no
    worker started but the loader's own."""
    generators = find_generators(data=data.dataset, loader=data.loader).values()
    with seeded(0), held(generators):
        return next(TrainBatches(replace(data, workers=0), 2, 0).from_step(0))[0]


def row_batches(count: int, batch_size: int, seed: int, step: int = 0) -> Iterator[Tensor]:
    """Numbers `[B]` of the samples in each batch from `step` on, without end.

    Every batch is full, and every epoch uses each of `count` samples once.
    """
    batch_size = min(batch_size, count)
    epoch, first = divmod(step * batch_size, count)
    rows = _shuffled(count, seed, epoch)[first:]
    while True:
        while len(rows) < batch_size:
            epoch += 1
            rows = torch.cat([rows, _shuffled(count, seed, epoch)])
        yield rows[:batch_size]
        rows = rows[batch_size:]


class StepRows:
    """The rows of each step's batch, in the order of `row_batches`. Steps in sequence are the
    quickest.

    Args:
        count: number of samples.
        batch_size: samples of a batch; all of them where there are fewer.
        seed: seed of their order.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._size, self._seed = count, batch_size, seed
        self._batches: Iterator[Tensor] = iter(())
        self._next = -1

    def at(self, step: int) -> Tensor:
        """Numbers `[B]` of the samples of this step."""
        if step != self._next:
            self._batches = row_batches(self._count, self._size, self._seed, step)
        self._next = step + 1
        return next(self._batches)


def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(spread_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def spread_seed(seed: int, number: int) -> int:
    """A seed for each epoch, or rank, of a run with this seed."""
    # Hashed: torch's CPU generator takes 64 bits of seed and uses the lower 32.
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def view_seed(seed: int, epoch: int, row: int) -> int:
    """The seed of a sample's view in an epoch of a run with this seed."""
    return int(np.random.SeedSequence((seed, epoch, row)).generate_state(1)[0])


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """The loader, its samplers, and theirs: all that decide which samples it reads."""
    owners: list[Any] = [loader]
    for owner in owners:
        for name in ("sampler", "batch_sampler"):
            inner = getattr(owner, name, None)
            if hasattr(inner, "__dict__") and all(inner is not other for other in owners):
                owners.append(inner)
    return owners
