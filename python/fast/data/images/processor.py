"""Measure what an image processor of transformers does, on test pictures.

Each class of processors has flags of its own, and reads them in its own way. Its outputs for a few
test pictures tell all: scale and offset of each channel, their order, and where each pixel goes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.images.format import BGR
from fast.data.images.library import transformers_description
from fast.data.images.preprocessing import Preprocessing

WIDTH, HEIGHT = 400, 300
# Resizing by other code differs by a few levels of 255 at single pixels, 0.001 in the mean.
CLOSE = 0.005
# PIL.Image.Resampling, by number.
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def measure(processor: Any) -> Preprocessing:
    """How a processor prepares pictures.

    Raises:
        ValueError: it prepares them in a way that `ImageFormat` does not know.
    """
    pictures = _pictures()
    *flat, ramp, photo = _outputs(processor, pictures)
    colours, offset, gain = _colours(processor, flat)
    height, width = ramp.shape[1:]
    if (height, width) == (HEIGHT, WIDTH):
        return colours
    if height != width:
        raise _refusal(processor, f"gives pictures of {width}x{height}, which are not square")
    pixels = ((ramp - offset[:, None, None]) / gain[:, None, None]).double()
    resize, stretch = _resizing(processor, pixels.flip(0) if colours.bgr else pixels)
    resample = getattr(processor, "resample", None)
    preprocessing = replace(
        colours,
        size=height,
        resize=resize,
        stretch=stretch,
        interpolation="bilinear" if resample is None else _RESAMPLING[int(resample)],
    )
    form = replace(preprocessing, library=None).format(BGR if colours.bgr else len(offset))
    apart = ((form.prepare(pictures[-1]) - photo) / gain[:, None, None]).abs().mean()
    if apart > CLOSE:
        raise _refusal(processor, f"gives other pixels than here (by {apart:.2g} of 1)")
    return preprocessing


def _colours(processor: Any, flat: list[Tensor]) -> tuple[Preprocessing, Tensor, Tensor]:
    """What a processor does to colours, and its offset and gain `[C]`, in its order of channels.

    Args:
        flat: its outputs for the black, red, green and blue picture.

    Raises:
        ValueError: it does not scale each channel by itself.
    """
    height, width = flat[0].shape[1:]
    black, *primaries = (x[:, height // 2, width // 2] for x in flat)
    gains = torch.stack([colour - black for colour in primaries], 1)
    if len(black) == 1:
        gains = gains.sum(1, keepdim=True)
    bgr = len(black) == 3 and gains.diagonal().abs().sum() < gains.fliplr().diagonal().abs().sum()
    gain = gains.fliplr().diagonal() if bgr else gains.diagonal()
    if gains.abs().sum() > 1.001 * gain.sum() or gain.min() <= 0:
        raise _refusal(processor, "mixes or inverts the colours")
    colours = Preprocessing(
        library=transformers_description(processor),
        mean=_rounded(-black / gain),
        std=_rounded(1 / gain),
        bgr=bool(bgr),
        origin="the image processor",
    )
    return colours, black, gain


def _resizing(processor: Any, ramp: Tensor) -> tuple[int, bool]:
    """The length to which the shorter side was resized, and whether the other was, too.

    Args:
        ramp: what the processor made of the ramp, in 0..1, red first.

    Raises:
        ValueError: it resizes in another way.
    """
    across, down = ramp[0].mean(0), ramp[-1 if len(ramp) == 1 else 1].mean(1)
    sides = (_resized(across), _resized(down))
    stretch, resize = sides[0] == sides[1], min(sides)
    if resize < ramp.shape[1] or (not stretch and abs(sides[0] - resize * WIDTH / HEIGHT) > 2):
        raise _refusal(processor, "pads pictures, or crops them without resizing them")
    return resize, stretch


def _pictures() -> list[Any]:
    """Flat black, red, green and blue; a ramp, whose red rises from left to right and whose green
    rises downwards; and blurred noise.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    flat = np.zeros((4, HEIGHT, WIDTH, 3), np.uint8)
    for channel in range(3):
        flat[channel + 1, :, :, channel] = 255
    ramp = np.zeros((HEIGHT, WIDTH, 3))
    ramp[:, :, 0] = (np.arange(WIDTH) + 0.5) / WIDTH
    ramp[:, :, 1] = (np.arange(HEIGHT)[:, None] + 0.5) / HEIGHT
    # Rounding up or down at random keeps the means over rows and columns exact.
    dithered = (255 * ramp + rng.random(ramp.shape)).astype(np.uint8)
    noise = Image.fromarray(rng.integers(0, 256, (HEIGHT // 10, WIDTH // 10, 3), np.uint8))
    photo = noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return [*map(Image.fromarray, [*flat, dithered]), photo]


def _outputs(processor: Any, pictures: list[Any]) -> list[Tensor]:
    values = processor(images=pictures, return_tensors="pt").get("pixel_values")
    if not isinstance(values, Tensor) or values.dim() != 4 or values.shape[1] not in (1, 3):
        raise _refusal(processor, "does not make one picture [channels, height, width] of one")
    return list(values.float())


def _resized(profile: Tensor) -> int:
    """The length to which a side was resized.

    Args:
        profile: the middle `[n]` of that side; along the whole of it, values rise from 0 to 1.
    """
    n = len(profile)
    inner = slice(n // 8, n - n // 8)  # borders of a resized picture are not on the line
    x = torch.arange(n, dtype=torch.float64)[inner]
    x = x - x.mean()
    slope = (x * profile[inner]).sum() / x.square().sum()
    return round(1 / float(slope)) if slope > 0 else 0


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(float(v), 6) + 0.0 for v in values)


def _refusal(processor: Any, what: str) -> ValueError:
    return ValueError(
        f"{type(processor).__name__} {what}; prepare the data with it in Python, and call "
        "fast.finetune on tensors"
    )
