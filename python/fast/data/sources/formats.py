"""Which image files can be read here."""

from __future__ import annotations

from functools import cache
from typing import Any

# Raster formats that Pillow reads by itself. EPS is left out, because Pillow runs a program on it.
FORMATS = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM",
    "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM",
)  # fmt: skip
# The usual suffixes of images, and those of cameras and phones, which not every Pillow reads.
COMMON = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
CAMERA_FORMATS = frozenset((".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef"))


def pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as err:
        raise ImportError("reading image files needs Pillow: pip install pillow") from err
    return Image


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    image = pillow()
    image.init()
    return tuple(name for name in FORMATS if name in image.OPEN)


@cache
def readable_suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow reads here, in lower case. Without Pillow these are the
    `COMMON` ones, so that the error says what to install when a file is read."""
    try:
        pillow()
    except ImportError:
        return COMMON
    suffixes = pillow().registered_extensions().items()
    return frozenset(suffix for suffix, name in suffixes if name in readable_formats())
