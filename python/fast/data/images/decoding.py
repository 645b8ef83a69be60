"""Decode image files into 8-bit pictures as they are meant to be seen."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fast.data.sources.formats import pillow, readable_formats
from fast.errors import first_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

WHITE = (255, 255, 255, 255)
ORIENTATION = 0x0112  # tag of EXIF
# Values of `ORIENTATION` where height and width change places.
SIDEWAYS = (5, 6, 7, 8)
# What stands at bytes 4 to 10 of the pictures of phones, whatever their names end in.
HEIC = (b"ftyphe", b"ftypmi")
NO_FORMAT = "it is in no format that is read here"


class Unreadable(ValueError):
    """Says why an image cannot be read."""


def decode(
    opened: Callable[[], Any], channels: int | str | None
) -> tuple[Picture, tuple[int, int]]:
    """Read a picture: upright, and on white where it is transparent.

    Args:
        opened: returns the file's name, or a stream.
        channels: see `ImageFormat`; None: as many as the file has.

    Returns:
        the picture, in mode L or RGB, and its (width, height).

    Raises:
        Unreadable: the file is damaged, or this Pillow does not read its format.
    """
    try:
        with pillow().open(opened(), formats=readable_formats()) as picture:
            width, height = picture.size
            picture.load()
            orientation = _orientation(picture)
            size = (height, width) if orientation in SIDEWAYS else (width, height)
            return _upright(_eight_bits(picture, channels), orientation), size
    except pillow().UnidentifiedImageError as err:
        start = _first_bytes(opened())
        reason = NO_FORMAT if start else "it is empty"
        if start[4:10] in HEIC:
            reason = "it is HEIC, which is not read here: convert it to JPEG"
        raise Unreadable(reason) from err
    except Exception as err:  # decoders raise errors of every kind
        raise Unreadable(first_line(err)) from err


def _first_bytes(source: Any) -> bytes:
    """How a file begins that is given by its name, or as a stream."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return file.read(12)
    return source.read(12)


def _orientation(picture: Picture) -> int:
    """How the camera was held, 1 to 8; 1 is upright."""
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error):  # damaged tags harm no pixel
        return 1


def _upright(picture: Picture, orientation: int) -> Picture:
    turn = pillow().Transpose
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
    """The picture in mode L or RGB. 16-bit values are scaled here, because Pillow clips them."""
    image = pillow()
    mode = picture.mode
    deep = mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM"))
    if deep:
        values = np.asarray(picture).astype(np.uint32)
        picture = image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif mode in ("I", "F"):
        raise ValueError(f"values of mode {mode} have no known range; save it with 8 bits")
    grey = channels == 1 or (channels is None and (deep or mode in ("1", "L", "LA", "La")))
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        # Transparent colours are not seen, and may be anything.
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("L" if grey else "RGB")
