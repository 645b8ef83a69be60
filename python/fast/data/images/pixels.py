"""Raw images to network input: decode, resize, crop, scale to 0..1, normalise per channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fast.data.images.files import Unreadable, read
from fast.data.sources import EncodedImages, Split
from fast.errors import printable, some

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Prepared once and kept in memory up to this size; larger sets are decoded as they are read.
CACHE_BYTES = 2 << 30
CHUNK = 256
# ITU-R BT.601, as Pillow's convert("L").
LUMINANCE = (0.299, 0.587, 0.114)
BGR = "BGR"
# A strip is resized as a whole where it is at most so many times as long as wide.
LONGEST = 8
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class ImageFormat:
    """What the network wants: `(image / 255 - mean) / std`, float32 `[channels, size, size]`.

    size: None keeps the size of the images.
    mean, std: one value, or one per channel, in units of the full scale.
    channels: 1, 3 (red, green, blue), "BGR", or None: as many as the images have.
    resize: the shorter side becomes this, and of that the central square `size` is taken; None:
        `size`.
    stretch: both sides become `resize`, whatever the shape of the image.
    interpolation: one of `INTERPOLATIONS`. Arrays have no box, hamming and lanczos: bilinear and
        bicubic take their places.
    """

    size: int | None = None
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    channels: int | str | None = None
    resize: int | None = None
    stretch: bool = False
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"input size must be positive; got {self.size}")
        if self.resize is not None and (self.size is None or self.resize < self.size):
            raise ValueError(f"resize is {self.resize}: less than the input size {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be finite; got {tuple(values)}")
            if max(map(abs, values)) > 2:
                scaled = ",".join(f"{v / 255:.4g}" for v in values)
                raise ValueError(
                    f"{name} is {tuple(values)}, and images are in 0..1 when it is applied: of "
                    f"values in 0..255 give {scaled}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive; got {tuple(self.std)}")

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[N, C, H, W]` -> float32 `[N, channels, size, size]`."""
        x = images.float().div_(255)
        if self.channels is not None:
            x = _to_channels(x, 3 if self.channels == BGR else int(self.channels))
        if self.size is not None:
            x = self._fit(x)
        if self.channels == BGR:
            x = x.flip(1)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, x.shape[1]):
                raise ValueError(
                    f"{name} has {len(values)} values but the images have {x.shape[1]} channels"
                )
        mean = torch.tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return x.sub_(mean).div_(std)

    def prepared(self, picture: Picture) -> Tensor:
        """A picture in mode L or RGB as `[channels, size, size]`."""
        array = np.array(self.fit_picture(picture))
        image = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        # What is fit already is not to be resized again.
        return replace(self, size=None, resize=None)(torch.from_numpy(image.copy())[None])[0]

    def fit_picture(self, picture: Picture) -> Picture:
        """As arrays are fit, but on 8-bit values and without torch's threads."""
        if self.size is None:
            return picture
        from PIL import Image

        if not self.stretch:
            picture = _without_ends(picture)
        height, width = self._resized(picture.height, picture.width)
        if picture.size != (width, height):
            resample = Image.Resampling[self.interpolation.upper()]
            picture = picture.resize((width, height), resample)
        top, left = self._corner(height, width)
        return picture.crop((left, top, left + self.size, top + self.size))

    def _fit(self, x: Tensor) -> Tensor:
        """`x` in 0..1, resized (antialiased) and cropped."""
        assert self.size is not None
        height, width = self._resized(*x.shape[2:])
        if (height, width) != tuple(x.shape[2:]):
            if self.interpolation == "nearest":
                x = F.interpolate(x, [height, width], mode="nearest-exact")
            else:
                smooth = self.interpolation in ("bicubic", "lanczos")
                mode = "bicubic" if smooth else "bilinear"
                x = F.interpolate(x, [height, width], mode=mode, antialias=True).clamp_(0, 1)
        top, left = self._corner(height, width)
        return x[:, :, top : top + self.size, left : left + self.size]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        side = self.resize or self.size
        assert side is not None
        if self.stretch:
            return side, side
        short = min(height, width)
        # Cut off, not rounded, as torchvision does.
        return side * height // short, side * width // short

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the central square."""
        assert self.size is not None
        return round((height - self.size) / 2), round((width - self.size) / 2)


SKIP = " (or go on without: --skip-broken)"


@dataclass
class ImageReport:
    """What was met while images were read.

    broken: names of those that cannot be read, and why.
    sizes: (width, height) as stored.
    """

    broken: dict[str, str] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def refuse_broken(self, way_out: str = "") -> None:
        """Raise ValueError where images cannot be read; `way_out` ends the message."""
        if not self.broken:
            return
        name, reason = next(iter(self.broken.items()))
        message = (
            f"{printable(name)}: not a readable image ({printable(reason)}); remove or replace it"
        )
        if len(self.broken) > 1:
            others = some(list(self.broken)[1:], 9)
            message += f"; {len(self.broken)} cannot be read, also {others}"
        raise ValueError(message + way_out)


def merged(reports: Iterable[ImageReport]) -> ImageReport:
    """One of several splits."""
    whole = ImageReport()
    for report in reports:
        whole.broken |= report.broken
        whole.sizes |= report.sizes
    return whole


def is_image_split(split: Split) -> bool:
    x = split.inputs
    return isinstance(x, EncodedImages) or (
        isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim in (3, 4)
    )


def prepare_images(
    split: Split, form: ImageFormat, report: ImageReport | None = None
) -> tuple[Tensor, Tensor] | PreparedImages:
    """The split as `(float32 [N, C, H, W], int64 [N])`; a lazy Dataset above `CACHE_BYTES`.

    Args:
        report: takes the images that cannot be read, which are left out; None: they are an error.

    Raises:
        ValueError: images cannot be read (they are named), or sizes differ and none was given.
    """
    found = report if report is not None else ImageReport()
    prepared = PreparedImages(split, form)
    out: Tensor | None = None
    good: list[int] = []
    for index, images in prepared.chunks(found):
        if out is None:
            shape = images.shape[1:]
            lazy = 4 * shape.numel() * len(split) > CACHE_BYTES
            out = torch.empty((0 if lazy else len(split), *shape))
        if images.shape[1:] != out.shape[1:]:
            prepared.refuse(index[0], images.shape[1:], out.shape[1:])
        if len(out):
            out[len(good) : len(good) + len(index)] = images
        good += index
    if report is None or out is None:
        found.refuse_broken(SKIP if report is None else "")
    assert out is not None, "a split has samples"
    if len(good) < len(split):
        prepared = PreparedImages(split.subset(np.array(good)), form)
    return (out[: len(good)], prepared.labels) if len(out) else prepared


class PreparedImages(Dataset):
    """Decodes and normalises on access; for sets that do not fit into memory as floats."""

    def __init__(self, split: Split, form: ImageFormat):
        self.inputs, self.form = split.inputs, form
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        report = ImageReport()
        _, images = self._read(range(i, i + 1), report)
        report.refuse_broken()
        return images[0], self.labels[i]

    def chunks(self, report: ImageReport) -> Iterator[tuple[list[int], Tensor]]:
        """Rows and images `[n, C, H, W]`, chunk by chunk; what cannot be read is left out."""
        for start in range(0, len(self), CHUNK):
            rows, images = self._read(range(start, min(start + CHUNK, len(self))), report)
            if rows:
                yield rows, images

    def _read(self, index: range, report: ImageReport) -> tuple[list[int], Tensor]:
        if not isinstance(self.inputs, EncodedImages):
            images = channels_first(self.inputs[index.start : index.stop])
            report.sizes.add((images.shape[3], images.shape[2]))
            return list(index), self.form(images)
        decoded: dict[int, np.ndarray] = {}
        first: np.ndarray | None = None
        for i in index:
            image = self._decode(i, report)
            if image is None:
                continue
            first = image if first is None else first
            if image.shape != first.shape:
                self.refuse(i, image.shape, first.shape)
            decoded[i] = image
        if first is None:
            return [], torch.empty(0)
        # torch sees whole chunks only: on a busy machine its threads waited 15 ms for each other on
        # every image (5 in torch.cat), where decoding and resizing one takes 0.7.
        done = replace(self.form, size=None, resize=None)  # they have their size
        return list(decoded), done(torch.from_numpy(np.stack(list(decoded.values()))))

    def _decode(self, i: int, report: ImageReport) -> np.ndarray | None:
        """Image `i` as uint8 `[C, H, W]`, fit to the size; None where it is broken: reported."""
        form = self.form
        # Lets the JPEG decoder scale by 1/2, 1/4, 1/8, never below twice the wanted size.
        draft = 2 * (form.resize or form.size) if form.size is not None else None
        try:
            picture, size = read(lambda: self.inputs.open(i), form.channels, draft)
        except Unreadable as err:
            name = self.inputs.names[i]
            report.broken[name] = str(err).replace(name, "the file")
            return None
        report.sizes.add(size)
        array = np.array(form.fit_picture(picture))
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)

    def refuse(self, i: int, shape: Sequence[int], others: Sequence[int]) -> None:
        """Raise ValueError: image `i` is not shaped as the others."""
        same_size = tuple(shape[1:]) == tuple(others[1:])
        way_out = "convert them to one colour mode" if same_size else "give an input size"
        option = "" if same_size else " (--input-size)"
        raise ValueError(
            f"{printable(self.inputs.names[i])}: [C, H, W] is {list(shape)}, of others "
            f"{list(others)}; {way_out}{option}"
        )


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
    return torch.from_numpy(np.ascontiguousarray(x))


def _without_ends(picture: Picture) -> Picture:
    """The middle of a strip, where all of it would be enlarged to be thrown away."""
    width, height = picture.size
    most = LONGEST * min(width, height)
    if max(width, height) <= most:
        return picture
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return picture.crop((left, top, width - left, height - top))


def _to_channels(x: Tensor, channels: int) -> Tensor:
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 4:  # seen on white, as files are
        x = x[:, :3] * x[:, 3:] + (1 - x[:, 3:])
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.repeat(1, channels, 1, 1)
    if channels == 1:
        return (x * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    raise ValueError(f"the network takes {channels} channels, the images have {x.shape[1]}")
