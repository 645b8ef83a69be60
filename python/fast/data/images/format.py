"""Raw images to network input: resize, crop, scale to 0..1, normalise per channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fast.data.images.library import library_transform

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# ITU-R BT.601, as Pillow's convert("L").
LUMINANCE = (0.299, 0.587, 0.114)
BGR = "BGR"
# A picture that is longer than this many times its width loses its ends before it is resized: they
# would be enlarged and then cut off.
LONGEST = 8
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """What the network takes: `(image / 255 - mean) / std`, float32 `[channels, size, size]`.

    Attributes:
        size: None keeps the size of the images.
        mean, std: one value, or one per channel, in units of the full scale.
        channels: 1, 3 (red, green, blue), "BGR", or None: as many as the images have.
        resize: the shorter side becomes this, and the central square of `size` is taken from that;
            None: `size`.
        stretch: both sides become `resize`, whatever the shape of the image.
        interpolation: one of `INTERPOLATIONS`. Arrays have no box, hamming and lanczos: bilinear
            and bicubic take their places.
        library: description of a library's own transform, which then prepares pictures from files;
            the other fields describe what it does, for augmentation, for arrays and for readers.
    """

    size: int | None = None
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    channels: int | str | None = None
    resize: int | None = None
    stretch: bool = False
    interpolation: str = "bicubic"
    library: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"input size must be positive; got {self.size}")
        if self.resize is not None and self.size is None:
            raise ValueError(
                f"resize is {self.resize}, and the side of the central square that is then taken "
                "is not given: pass size (--input-size)"
            )
        if self.resize is not None and self.size is not None and self.resize < self.size:
            raise ValueError(f"resize is {self.resize}: less than the input size {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be finite; got {tuple(values)}")
            if max(map(abs, values)) > 2:
                scaled = ",".join(f"{v / 255:.4g}" for v in values)
                raise ValueError(
                    f"{name} is {tuple(values)}, and images are in 0..1 when it is applied: if it "
                    f"is meant for 0..255, give {scaled}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive; got {tuple(self.std)}")

    @property
    def normalises(self) -> bool:
        """Whether the network takes other numbers than those of images in 0..1."""
        return any(self.mean) or any(value != 1 for value in self.std)

    @property
    def without_resizing(self) -> ImageFormat:
        """This format without resizing, for images that have their size already."""
        return replace(self, size=None, resize=None, library=None)

    @property
    def description(self) -> dict[str, Any]:
        """The fields as JSON has them, for `evaluation_transform`."""
        plain = asdict(self)
        return plain | {"mean": list(self.mean), "std": list(self.std)}

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[N, C, H, W]` -> float32 `[N, channels, size, size]`."""
        x = images.float().div_(255)
        if self.channels is not None:
            x = _to_channels(x, 3 if self.channels == BGR else int(self.channels))
        if self.size is not None:
            x = self._fit_array(x, self.size)
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

    def prepare(self, picture: Picture) -> Tensor:
        """A picture in mode L or RGB -> float32 `[channels, size, size]`."""
        return self.finish(torch.from_numpy(self.fit(picture))[None])[0]

    def finish(self, images: Tensor) -> Tensor:
        """Results of `fit`, stacked to `[N, C, H, W]` -> float32, scaled and normalised."""
        return images if self.library else self.without_resizing(images)

    @cached_property
    def _library(self) -> Callable[[Picture], Tensor]:
        return library_transform(self.library or {})

    def fit(self, picture: Picture) -> np.ndarray:
        """Resize and crop a picture -> uint8 `[C, size, size]`; a library's transform returns
        float32, and has normalised it."""
        if self.library:
            return self._library(picture if self.stretch else _without_ends(picture)).numpy()
        if self.size is not None:
            from PIL import Image

            if not self.stretch:
                picture = _without_ends(picture)
            height, width = self._resized(picture.height, picture.width, self.size)
            if picture.size != (width, height):
                resample = Image.Resampling[self.interpolation.upper()]
                picture = picture.resize((width, height), resample)
            top, left = _corner(height, width, self.size)
            picture = picture.crop((left, top, left + self.size, top + self.size))
        return as_array(picture)

    def _fit_array(self, x: Tensor, size: int) -> Tensor:
        """`x` in 0..1, resized (antialiased) and cropped as `fit` does it, but by torch."""
        height, width = self._resized(x.shape[2], x.shape[3], size)
        if (height, width) != tuple(x.shape[2:]):
            if self.interpolation == "nearest":
                x = F.interpolate(x, [height, width], mode="nearest-exact")
            else:
                smooth = self.interpolation in ("bicubic", "lanczos")
                mode = "bicubic" if smooth else "bilinear"
                x = F.interpolate(x, [height, width], mode=mode, antialias=True).clamp_(0, 1)
        top, left = _corner(height, width, size)
        return x[:, :, top : top + size, left : left + size]

    def _resized(self, height: int, width: int, size: int) -> tuple[int, int]:
        side = self.resize or size
        if self.stretch:
            return side, side
        short = min(height, width)
        # Cut off, not rounded, as torchvision does.
        return side * height // short, side * width // short


def evaluation_transform(description: Mapping[str, Any]) -> Callable[[Picture], Tensor]:
    """The transform that a run measured with: it turns a picture into float32 `[C, size, size]`.

    This is how a saved run prepares what it is asked about:

        images = json.loads((run / "data.json").read_text())["images"]
        transform = evaluation_transform(images)
        picture, _ = decode(lambda: "photo.jpg", images["channels"])     # fast.data.images.decoding
        logits = network(transform(picture)[None])

    Args:
        description: what `ImageFormat.description` returned and a run saved as `images`; it may
            have gone through JSON, and may have other keys.

    Raises:
        ValueError: the description is damaged.
        ImportError: the library whose transform it was is not installed.
    """
    names = {f.name for f in fields(ImageFormat)}
    try:
        form = ImageFormat(**{k: v for k, v in description.items() if k in names})
    except TypeError as error:
        raise ValueError(f"the preprocessing cannot be read: {error}") from error
    if form.library:
        library_transform(form.library)
    return form.prepare


def as_array(picture: Picture) -> np.ndarray:
    """A picture as uint8 `[C, H, W]`."""
    array = np.array(picture)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(np.moveaxis(array, -1, 0))


def _corner(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the central square."""
    return round((height - size) / 2), round((width - size) / 2)


def _without_ends(picture: Picture) -> Picture:
    width, height = picture.size
    most = LONGEST * min(width, height)
    if max(width, height) <= most:
        return picture
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return picture.crop((left, top, width - left, height - top))


def _to_channels(x: Tensor, channels: int) -> Tensor:
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 4:  # on white, as files are read
        x = x[:, :3] * x[:, 3:] + (1 - x[:, 3:])
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.repeat(1, channels, 1, 1)
    if channels == 1:
        return (x * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    raise ValueError(f"the network takes {channels} channels, the images have {x.shape[1]}")
