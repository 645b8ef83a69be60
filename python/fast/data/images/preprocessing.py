"""How the images that a network was trained on were prepared, as it or its library says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fast.data.images.format import INTERPOLATIONS, ImageFormat
from fast.data.images.library import torchvision_description


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Fields of `ImageFormat`, with None for what nobody says.

    Attributes:
        bgr: whether the network takes blue first.
        library: description of the library's own transform (`fast.data.images.library`).
        origin: who says it, for a reader.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bgr: bool = False
    resize: int | None = None
    stretch: bool = False
    interpolation: str = "bicubic"
    library: Mapping[str, Any] | None = None
    origin: str = ""

    def format(self, channels: int | str | None) -> ImageFormat:
        """The whole format; mean and std must be there."""
        assert self.mean is not None
        assert self.std is not None
        return ImageFormat(
            size=self.size,
            mean=self.mean,
            std=self.std,
            channels=channels,
            resize=self.resize,
            stretch=self.stretch,
            interpolation=self.interpolation,
            library=self.library,
        )


def from_config(config: Mapping[str, Any], origin: str) -> Preprocessing:
    """Read timm's keys: input_size, mean, std, crop_pct, crop_mode, interpolation.

    A `crop_pct` above 1, which pads, counts as 1.
    """
    size = config.get("input_size")
    side = int(size[-1] if isinstance(size, (tuple, list)) else size) if size else None
    mode = config.get("interpolation")
    return Preprocessing(
        size=side,
        mean=_values(config.get("mean")),
        std=_values(config.get("std")),
        resize=math.floor(side / min(1, config.get("crop_pct") or 1)) if side else None,
        stretch=config.get("crop_mode") == "squash",
        interpolation=mode if mode in INTERPOLATIONS else "bicubic",
        origin=origin,
    )


def from_preset(preset: Any, origin: str) -> Preprocessing:
    """Read what `weights.transforms()` of torchvision returns."""
    return Preprocessing(
        size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        library=torchvision_description(preset),
        origin=origin,
    )


def declared(model: nn.Module) -> Preprocessing:
    """What a network says about itself: `pretrained_cfg` or `default_cfg` as timm's networks have
    them, a mapping `preprocessing` with the same keys, or plain attributes `mean` and `std`.

    Buffers of these names are left alone: a network that has them normalises by itself.
    """
    for name in ("pretrained_cfg", "default_cfg", "preprocessing"):
        config = getattr(model, name, None)
        config = config if isinstance(config, Mapping) else vars(config) if config else {}
        if config.get("mean") is not None and config.get("std") is not None:
            return from_config(config, f"the network's {name}")
    values = {name: getattr(model, name, None) for name in ("mean", "std")}
    if any(value is None or isinstance(value, (Tensor, nn.Module)) for value in values.values()):
        return Preprocessing()
    try:
        return from_config(values, "the network's mean and std")
    except (TypeError, ValueError):  # something else has these names, such as methods
        return Preprocessing()


def _values(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else (float(value),)
