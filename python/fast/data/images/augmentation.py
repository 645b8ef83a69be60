"""Random views of training pictures, by the transforms of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fast.data.images.format import ImageFormat
from fast.errors import import_library

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Share of the picture's area that a crop has at least. From scratch 0.08 is usual (Szegedy et al.
# 2015); a network that knows its objects already is fine-tuned on larger parts of them.
LEAST_AREA = {"light": 0.5, "strong": 0.25}
# RandAugment (Cubuk et al. 2020): operations on a picture, and their strength of 30.
OPERATIONS, MAGNITUDE = 2, 9


def augmentation(preset: str, form: ImageFormat) -> Callable[[Picture], Picture]:
    """Make random views: a crop of random size and place, resized as the network takes it, mirrored
    half of the time; with `strong` also RandAugment. All random numbers come from torch.

    Args:
        preset: `light` or `strong`.
        form: says the size and the interpolation.

    Raises:
        ImportError: torchvision is not installed, or cannot be imported.
    """
    v2 = import_library("torchvision.transforms.v2", f"augment={preset!r} needs")
    mode = v2.InterpolationMode(form.interpolation)
    area = (LEAST_AREA[preset], 1.0)
    steps: list[Any] = [v2.RandomHorizontalFlip()]
    if preset == "strong":
        steps.append(v2.RandAugment(OPERATIONS, MAGNITUDE))
    rest = v2.Compose(steps)

    def view(picture: Picture) -> Picture:
        size = [form.size, form.size] if form.size else [picture.height, picture.width]
        return rest(v2.RandomResizedCrop(size, scale=area, interpolation=mode)(picture))

    return view
