"""Raw images to network input: decode, fit to a square, scale to 0..1, normalise per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fast.train.sources import EncodedImages, Split

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Prepared once and kept in memory up to this size; larger sets are decoded as they are read.
CACHE_BYTES = 2 << 30
CHUNK = 256
# ITU-R BT.601, as Pillow's convert("L").
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ImageFormat:
    """What the network wants: `(image / 255 - mean) / std`, float32 `[channels, size, size]`.

    size None keeps the size of the images; channels None keeps theirs. mean and std have one value,
    or one per channel, in units of the full scale.
    """

    size: int | None = None
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"input size must be positive; got {self.size}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive; got {tuple(self.std)}")

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[N, C, H, W]` -> float32 `[N, channels, size, size]`."""
        x = images.float().div_(255)
        if self.channels is not None and x.shape[1] != self.channels:
            x = _to_channels(x, self.channels)
        if self.size is not None:
            x = fit(x, self.size)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, x.shape[1]):
                raise ValueError(
                    f"{name} has {len(values)} values but the images have {x.shape[1]} channels"
                )
        mean = torch.tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return x.sub_(mean).div_(std)


def fit(x: Tensor, size: int) -> Tensor:
    """Shorter side to `size` (bicubic, antialiased), then the central square; `x` in 0..1."""
    height, width = x.shape[2:]
    if (height, width) == (size, size):
        return x
    height, width, top, left = _central_square(height, width, size)
    x = F.interpolate(
        x, [height, width], mode="bicubic", antialias=True, align_corners=False
    ).clamp_(0, 1)
    return x[:, :, top : top + size, left : left + size]


def _central_square(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """(height, width) with the shorter side `size`; (top, left) of the central square in that."""
    scale = size / min(height, width)
    height, width = max(round(height * scale), size), max(round(width * scale), size)
    return height, width, (height - size) // 2, (width - size) // 2


def is_image_split(split: Split) -> bool:
    x = split.inputs
    return isinstance(x, EncodedImages) or (
        isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim in (3, 4)
    )


def prepare_images(split: Split, form: ImageFormat) -> tuple[Tensor, Tensor] | Dataset:
    """The split as `(float32 [N, C, H, W], int64 [N])`; a lazy Dataset above `CACHE_BYTES`.

    Raises:
        ValueError: an image cannot be read (it is named), or sizes differ and none was given.
    """
    prepared = PreparedImages(split, form)
    x = prepared.read(range(1))
    if 4 * x[0].numel() * len(split) > CACHE_BYTES:
        return prepared
    out = torch.empty((len(split), *x.shape[1:]))
    for start in range(0, len(split), CHUNK):
        index = range(start, min(start + CHUNK, len(split)))
        out[index.start : index.stop] = prepared.read(index, shape=x.shape[1:])
    return out, prepared.labels


class PreparedImages(Dataset):
    """Decodes and normalises on access; for sets that do not fit into memory as floats."""

    def __init__(self, split: Split, form: ImageFormat):
        self.inputs, self.form = split.inputs, form
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.read(range(i, i + 1))[0], self.labels[i]

    def read(self, index: range, shape: torch.Size | None = None) -> Tensor:
        """Images `index`, prepared, `[n, C, H, W]`; `shape` is what each must have."""
        if not isinstance(self.inputs, EncodedImages):
            return self.form(channels_first(self.inputs[index.start : index.stop]))
        images: list[np.ndarray] = []
        for i in index:
            image = _decode(self.inputs, i, self.form)
            if images and image.shape != images[0].shape:
                self._refuse(i, image.shape, images[0].shape)
            images.append(image)
        # torch sees whole chunks only: on a busy machine its threads waited 15 ms for each other on
        # every image (5 in torch.cat), where decoding and resizing one takes 0.7.
        out = self.form(torch.from_numpy(np.stack(images)))
        if shape is not None and out.shape[1:] != shape:
            self._refuse(index.start, out.shape[1:], shape)
        return out

    def _refuse(self, i: int, shape: Sequence[int], others: Sequence[int]) -> None:
        same_size = tuple(shape[1:]) == tuple(others[1:])
        raise ValueError(
            f"{self.inputs.names[i]}: [C, H, W] is {list(shape)}, of others {list(others)}; "
            + ("convert them to one colour mode" if same_size else "give an input size")
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


def _to_channels(x: Tensor, channels: int) -> Tensor:
    if x.shape[1] == 4:  # alpha
        x = x[:, :3]
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.repeat(1, channels, 1, 1)
    if channels == 1:
        return (x * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    raise ValueError(f"the network takes {channels} channels, the images have {x.shape[1]}")


def _decode(images: EncodedImages, i: int, form: ImageFormat) -> np.ndarray:
    """Image `i` as uint8 `[C, H, W]`, fit to the size; a named ValueError when it is broken."""
    try:
        from PIL import Image
    except ImportError as err:
        raise ImportError("reading image files needs Pillow: pip install pillow") from err
    try:
        with Image.open(images.open(i)) as picture:
            if form.size is not None:
                # Lets the JPEG decoder scale by 1/2, 1/4, 1/8, never below twice the wanted size.
                picture.draft(None, (2 * form.size, 2 * form.size))
            array = np.array(_fitted(_eight_bits(picture, form), form.size))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise ValueError(
            f"{images.names[i]}: not a readable image ({err}); remove or replace it"
        ) from err
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _eight_bits(picture: Picture, form: ImageFormat) -> Picture:
    """In mode L or RGB; 16-bit values are scaled here, because Pillow clips them."""
    if picture.mode.startswith("I;16"):
        from PIL import Image

        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"values of mode {picture.mode} have no known range; save it with 8 bits")
    grey = form.channels == 1 or (form.channels is None and picture.mode in ("1", "L"))
    return picture.convert("L" if grey else "RGB")


def _fitted(picture: Picture, size: int | None) -> Picture:
    """As `fit`, but on 8-bit values and without torch's threads."""
    if size is None or picture.size == (size, size):
        return picture
    from PIL import Image

    height, width, top, left = _central_square(picture.height, picture.width, size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))
