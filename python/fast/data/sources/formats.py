"""Which image files can be read here."""

from __future__ import annotations

from functools import cache
from typing import Any

# Pillow's raster formats. EPS, say, is not among them: it runs a program on the file.
FORMATS = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM",
    "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM",
)  # fmt: skip
# Suffixes that everybody takes for images; not every Pillow can read the second.
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
    """Suffixes of the files that Pillow reads here, in lower case; without Pillow those of images
    all the same: what cannot be read is told when it is read."""
    try:
        pillow()
    except ImportError:
        return COMMON
    suffixes = pillow().registered_extensions().items()
    return frozenset(suffix for suffix, name in suffixes if name in readable_formats())
