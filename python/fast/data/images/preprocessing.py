"""How images were prepared that a network was trained on, as the network or its library says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fast.data.images.pixels import INTERPOLATIONS, ImageFormat


@dataclass(frozen=True)
class Preprocessing:
    """Fields of `ImageFormat`; None where it is not said.

    origin: who says it, for a reader.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bgr: bool = False
    resize: int | None = None
    stretch: bool = False
    interpolation: str = "bicubic"
    origin: str = ""

    def format(self, channels: int | str | None) -> ImageFormat:
        """For a network that says it all."""
        assert self.mean is not None
        assert self.std is not None
        return ImageFormat(
            self.size,
            self.mean,
            self.std,
            channels,
            self.resize,
            self.stretch,
            self.interpolation,
        )


def from_config(config: Mapping[str, Any], origin: str) -> Preprocessing:
    """Of a mapping with timm's keys: input_size, mean, std, crop_pct, crop_mode, interpolation."""
    size = config.get("input_size")
    side = int(size[-1] if isinstance(size, (tuple, list)) else size) if size else None
    mode = config.get("interpolation")
    return Preprocessing(
        size=side,
        mean=_values(config.get("mean")),
        std=_values(config.get("std")),
        resize=math.floor(side / (config.get("crop_pct") or 1)) if side else None,
        stretch=config.get("crop_mode") == "squash",
        interpolation=mode if mode in INTERPOLATIONS else "bicubic",
        origin=origin,
    )


def from_preset(preset: Any, origin: str) -> Preprocessing:
    """Of what `weights.transforms()` of torchvision gives."""
    return Preprocessing(
        size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        origin=origin,
    )


def declared(model: nn.Module) -> Preprocessing:
    """What the network of a file says about itself: `pretrained_cfg` or `default_cfg` as timm's
    networks have them, a mapping `preprocessing` with the same keys, or plain attributes `mean` and
    `std`.

    Buffers of these names are left alone: a network that has them normalises by itself.
    """
    for name in ("pretrained_cfg", "default_cfg", "preprocessing"):
        config = getattr(model, name, None)
        config = config if isinstance(config, Mapping) else vars(config) if config else {}
        if config.get("mean") is not None and config.get("std") is not None:
            return from_config(config, f"the network's {name}")
    found = {name: getattr(model, name, None) for name in ("mean", "std")}
    if any(value is None or isinstance(value, (Tensor, nn.Module)) for value in found.values()):
        return Preprocessing()
    try:
        return from_config(found, "the network's mean and std")
    except (TypeError, ValueError):  # methods, say, of these names
        return Preprocessing()


def _values(given: Any) -> tuple[float, ...] | None:
    if given is None:
        return None
    return tuple(map(float, given)) if isinstance(given, (tuple, list)) else (float(given),)
