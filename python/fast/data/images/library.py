"""The transforms that timm, torchvision and transformers have for their own networks.

A description is plain data: it is saved with a run, and the transform is made of it again. It names
nothing but classes of the libraries, so that a stranger's file runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fast.errors import printable

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Transform = Callable[["Picture"], Tensor]
TIMM, TORCHVISION, TRANSFORMERS = "timm", "torchvision", "transformers"


def timm_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe `timm.data.create_transform(**config)`."""
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {"library": TIMM, **{name: _plain(config[name]) for name in names}}


def torchvision_description(preset: Any) -> dict[str, Any]:
    """Describe what `weights.transforms()` returns."""
    return {
        "library": TORCHVISION,
        "crop_size": preset.crop_size[0],
        "resize_size": preset.resize_size[0],
        "mean": list(preset.mean),
        "std": list(preset.std),
        "interpolation": preset.interpolation.value,
        "antialias": preset.antialias,
    }


def transformers_description(processor: Any) -> dict[str, Any] | None:
    """Describe an image processor; None where its class is not one of the library."""
    import transformers

    name = type(processor).__name__
    if getattr(transformers, name, None) is not type(processor):
        return None
    return {"library": TRANSFORMERS, "processor": _plain(processor.to_dict())}


def library_transform(description: Mapping[str, Any]) -> Transform:
    """The transform of a picture to float32 `[C, size, size]`.

    Args:
        description: what one of the functions above returned; it may have gone through JSON.

    Raises:
        ImportError: the library is not installed.
        ValueError: the description is of no library.
    """
    options = dict(description)
    library = options.pop("library", None)
    make = {TIMM: _timm, TORCHVISION: _torchvision, TRANSFORMERS: _transformers}.get(library)
    if make is None:
        raise ValueError(f"the preprocessing names the library {printable(library)!r}")
    return make(options)


def _timm(options: dict[str, Any]) -> Transform:
    from timm.data import create_transform

    tuples: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in options.items()}
    return create_transform(**tuples)


def _torchvision(options: dict[str, Any]) -> Transform:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    mode = InterpolationMode(options.pop("interpolation"))
    return ImageClassification(interpolation=mode, **options)


def _transformers(options: dict[str, Any]) -> Transform:
    import transformers

    name = str(options["processor"].get("image_processor_type"))
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.ImageProcessingMixin)):
        raise ValueError(f"transformers has no image processor {printable(name)!r}")
    processor = kind.from_dict(options["processor"])

    def transform(picture: Picture) -> Tensor:
        pixels = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        return torch.as_tensor(pixels)[0].float()

    return transform


def _plain(value: Any) -> Any:
    """A value in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # an enumeration's, too
    return value
