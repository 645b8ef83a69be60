"""Image files: which can be read, and what is seen in them, in 8 bits."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fast.errors import first_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Pillow's raster formats. EPS, say, is not among them: it runs a program on the file.
FORMATS: tuple[str, ...]
FORMATS = ("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG")
FORMATS += ("PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM")
# Known as images, but not to every Pillow.
CAMERA_FORMATS = frozenset((".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef"))
WHITE = (255, 255, 255, 255)
# Values of the EXIF tag Orientation where height and width change places.
SIDEWAYS = (5, 6, 7, 8)


@cache
def readable_suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow reads here, in lower case.

    Raises:
        ImportError: there is no Pillow.
    """
    suffixes = _pillow().registered_extensions().items()
    return frozenset(suffix for suffix, form in suffixes if form in _formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    image = _pillow()
    image.init()
    return tuple(form for form in FORMATS if form in image.OPEN)


class Unreadable(ValueError):
    """Says why an image cannot be read."""


def read(
    opened: Callable[[], Any], channels: int | str | None, draft: int | None
) -> tuple[Picture, tuple[int, int]]:
    """The picture in a file as it is seen: upright, on white where it is transparent.

    Args:
        opened: gives the file's name, or a stream.
        channels: of `ImageFormat`; None: as many as there are.
        draft: the decoder may shrink the picture, to sides not below this.

    Returns:
        the picture, in mode L or RGB, and its (width, height) as it is seen.

    Raises:
        Unreadable: damaged, or in no format that is read here.
    """
    image = _pillow()
    try:
        with image.open(opened(), formats=_formats()) as picture:
            width, height = picture.size
            if draft is not None:
                picture.draft(None, (draft, draft))
            picture.load()
            orientation = _orientation(picture)
            size = (height, width) if orientation in SIDEWAYS else (width, height)
            return _upright(_eight_bits(picture, channels), orientation), size
    except Exception as err:  # decoders raise errors of every kind
        raise Unreadable(first_line(err)) from err


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as err:
        raise ImportError("reading image files needs Pillow: pip install pillow") from err
    return Image


def _orientation(picture: Picture) -> int:
    """How a camera was held, 1 to 8; 1 is upright."""
    try:
        return picture.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, struct.error):  # damaged, and no pixels in it
        return 1


def _upright(picture: Picture, orientation: int) -> Picture:
    turn = _pillow().Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _eight_bits(picture: Picture, channels: int | str | None) -> Picture:
    """In mode L or RGB; 16-bit values are scaled here, because Pillow clips them."""
    image = _pillow()
    mode = picture.mode
    deep = mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM"))
    if deep:
        values = np.asarray(picture).astype(np.uint32)
        picture = image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif mode in ("I", "F"):
        raise ValueError(f"values of mode {mode} have no known range; save it with 8 bits")
    grey = channels == 1 or (channels is None and (deep or mode in ("1", "L", "LA", "La")))
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        # Colours that are transparent are not seen, and may be anything.
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("L" if grey else "RGB")
