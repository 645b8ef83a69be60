"""Prepare the images of a split: in memory where they fit, else as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fast.data.images.augmentation import augmentation
from fast.data.images.decoding import Unreadable, decode
from fast.data.images.format import ImageFormat, as_array
from fast.data.sources import EncodedImages, FileReport, Split
from fast.data.sources.formats import pillow
from fast.errors import printable
from fast.progress import bar
from fast.workers import in_workers, workers_for

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return 16 << 30


# A split is prepared once and kept in memory up to this size; a larger one is decoded as it is
# read. A run has up to four splits.
CACHE_BYTES = min(2 << 30, _physical_memory() // 8)
# Images that are prepared at once; a worker sends them through shared memory, which may be small.
CHUNK, SENT = 256, 16
# From this many images on, a progress bar is shown.
MANY = 1000


def is_image_split(split: Split) -> bool:
    x = split.inputs
    return isinstance(x, EncodedImages) or (
        isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim in (3, 4)
    )


def prepare_images(
    split: Split,
    form: ImageFormat,
    report: FileReport | None = None,
    *,
    augment: str = "none",
    workers: int = 0,
    progress: bool | None = False,
) -> tuple[Tensor, Tensor] | PreparedImages:
    """The split as `(float32 [N, C, H, W], int64 [N])`. If that takes more than `CACHE_BYTES`, or
    pictures are augmented, it is a Dataset instead, which decodes an image when it is asked for.

    Args:
        report: records the images that cannot be read; None: they are an error.
        augment: `none`, or a preset of `fast.data.images.augmentation`.
        workers: processes that decode.
        progress: show a bar while many images are read; None: in a terminal or a notebook.

    Raises:
        ValueError: images cannot be read (they are named), or sizes differ and `form` has none.
    """
    report = FileReport(skips=False) if report is None else report
    prepared = prepared_by(split, form, augment)
    out: Tensor | None = None
    good: list[int] = []
    for index, images in prepared.chunks(report, workers, progress):
        if out is None:
            shape = images.shape[1:]
            lazy = augment != "none" or 4 * shape.numel() * len(split) > CACHE_BYTES
            out = torch.empty((0 if lazy else len(split), *shape))
        if images.shape[1:] != out.shape[1:]:
            prepared.refuse(index[0], images.shape[1:], out.shape[1:])
        if len(out):
            out[len(good) : len(good) + len(index)] = images
        good += index
    report.check(any_read=out is not None)
    assert out is not None, "a split has samples"
    if len(good) < len(split):
        prepared = prepared_by(split.subset(np.array(good)), form, augment)
    return (out[: len(good)], prepared.labels) if len(out) else prepared


def prepared_by(split: Split, form: ImageFormat, augment: str) -> PreparedImages:
    if augment == "none":
        return PreparedImages(split, form)
    return AugmentedImages(split, form, augment)


class PreparedImages(Dataset):
    """Decodes and normalises on access; for sets that do not fit into memory as floats.

    Attributes:
        labels: int64 `[N]`.
        workers: how many processes should read it, unless the user says.
        augment: the preset of `fast.data.images.augmentation` that makes its views.
    """

    augment = "none"

    def __init__(self, split: Split, form: ImageFormat):
        self.inputs, self.form = split.inputs, form
        self.labels = torch.from_numpy(split.labels)
        self.workers = workers_for(len(split))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: np.ndarray, *, augment: bool = True) -> PreparedImages:
        """A set of these rows alone; without `augment` they are as they are at evaluation."""
        split = Split(inputs=self.inputs, labels=self.labels.numpy()).subset(rows)
        return prepared_by(split, self.form, self.augment if augment else "none")

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        report = FileReport()
        _, images = self._read(range(i, i + 1), report)
        report.check(any_read=False)
        return images[0], self.labels[i]

    def chunks(
        self, report: FileReport, workers: int = 0, progress: bool | None = False
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Rows and images `[n, C, H, W]`, chunk by chunk; what cannot be read is left out."""

        def read(chunk: range) -> tuple[list[int], Tensor, FileReport]:
            part = FileReport()
            return *self._read(chunk, part), part

        if not isinstance(self.inputs, EncodedImages):
            workers = 0  # there is nothing to decode
        size = SENT if workers else CHUNK
        starts = range(0, len(self), size)
        chunks = (range(start, min(start + size, len(self))) for start in starts)
        show = progress if len(self) >= MANY else False
        with closing(bar(len(self), "reading", show, unit="image")) as shown:
            for rows, images, part in in_workers(read, chunks, workers):
                shown.update(len(rows) + len(part.broken))
                report.broken |= part.broken
                report.sizes |= part.sizes
                if rows:
                    yield rows, images

    def batches(
        self, batch_size: int, report: FileReport, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `[B, C, H, W]` and their labels, decoded as they are asked for; what cannot be
        read is left out."""
        ready: list[Tensor] = []
        rows: list[int] = []
        for more, images in self.chunks(report, workers, progress=None):
            if ready and images.shape[1:] != ready[0].shape[1:]:
                self.refuse(more[0], images.shape[1:], ready[0].shape[1:])
            ready, rows = [*ready, images], rows + more
            while len(rows) >= batch_size:
                whole = torch.cat(ready)
                yield whole[:batch_size], self.labels[rows[:batch_size]]
                ready, rows = [whole[batch_size:]], rows[batch_size:]
        if rows:
            yield torch.cat(ready), self.labels[rows]

    def _read(self, index: range, report: FileReport) -> tuple[list[int], Tensor]:
        if not isinstance(self.inputs, EncodedImages):
            images = channels_first(self.inputs[index.start : index.stop])
            report.sizes.add((images.shape[3], images.shape[2]))
            return list(index), self.form(images)
        decoded: dict[int, np.ndarray] = {}
        for i in index:
            picture = self._decode(i, report)
            if picture is not None:
                decoded[i] = image = self.form.fit(picture)
                first = next(iter(decoded.values()))
                if image.shape != first.shape:
                    self.refuse(i, image.shape, first.shape)
        if not decoded:
            return [], torch.empty(0)
        # torch sees whole chunks only: on a busy machine its threads waited 15 ms for each other on
        # every image (5 in torch.cat), where decoding and resizing one takes 0.7.
        arrays = list(decoded.values())
        stacked = np.stack(arrays) if len(arrays) > 1 else arrays[0][None]  # one is not copied
        return list(decoded), self.form.finish(torch.from_numpy(stacked))

    def _decode(self, i: int, report: FileReport) -> Picture | None:
        """Image `i`; None, and a line in the report, if it is broken."""
        try:
            picture, size = decode(lambda: self.inputs.open(i), self.form.channels)
        except Unreadable as err:
            name = self.inputs.names[i]
            report.broken[name] = str(err).replace(name, "the file")
            return None
        report.sizes.add(size)
        return picture

    def refuse(self, i: int, shape: Sequence[int], others: Sequence[int]) -> None:
        """Raise ValueError: image `i` is not shaped as the others."""
        same_size = tuple(shape[1:]) == tuple(others[1:])
        sizes = "give an input size (--input-size of fast finetune)"
        way_out = "convert them to one colour mode" if same_size else sizes
        raise ValueError(
            f"{printable(self.inputs.names[i])}: [C, H, W] is {list(shape)}, of others "
            f"{list(others)}; {way_out}"
        )


class AugmentedImages(PreparedImages):
    """Shows an image in a random view by `view`, and as it is at evaluation by `[i]`.

    Args:
        augment: a preset of `fast.data.images.augmentation`.
    """

    def __init__(self, split: Split, form: ImageFormat, augment: str):
        super().__init__(split, form)
        self.augment = augment
        self._augmented = augmentation(augment, form)

    def view(self, i: int, seed: int) -> tuple[Tensor, Tensor]:
        """Image `i` in a view that depends on the seed alone, and its label."""
        report = FileReport()
        picture = self._picture(i, report)
        report.check(any_read=False)
        assert picture is not None
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            pixels = as_array(self._augmented(picture))
        finally:
            torch.default_generator.set_state(before)
        return self.form.without_resizing(torch.from_numpy(pixels)[None])[0], self.labels[i]

    def _picture(self, i: int, report: FileReport) -> Picture | None:
        if isinstance(self.inputs, EncodedImages):
            return self._decode(i, report)
        array = np.moveaxis(channels_first(self.inputs[i : i + 1])[0].numpy(), 0, -1)
        return pillow().fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def channels_first(x: np.ndarray) -> Tensor:
    """uint8 `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` as `[N, C, H, W]`."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[-1] in (1, 3, 4):
        x = np.moveaxis(x, -1, 1)
    elif x.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"uint8 images must be [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4; got "
            f"shape {x.shape}"
        )
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))
