"""What training batches go through: the user's transform, which is checked, and mixing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fast.data.trees import kind, leaves, length
from fast.errors import import_library

Transform = Callable[[Any], Any]
Mix = Callable[[Any, Tensor], tuple[Any, Tensor]]


class CheckedTransform:
    """A transform of training batches.

    Args:
        transform: takes and returns a batch of inputs, on the CPU; None changes nothing.
        check: raises where the network does not take its argument. It is called for the first
            batch.
    """

    def __init__(self, transform: Transform | None, check: Callable[[Any], None]) -> None:
        self.transform = transform
        self._check: Callable[[Any], None] | None = check

    def __call__(self, inputs: Any, size: int) -> Any:
        """The batch on which the network is trained.

        Args:
            size: number of samples in the batch.

        Raises:
            TypeError, ValueError: the transform returned no batch of as many inputs, or one that
                the network does not take.
        """
        if self.transform is None:
            return inputs
        inputs = self.transform(inputs)
        batch = isinstance(inputs, (Tensor, Mapping, tuple, list))
        if not batch or not leaves(inputs):
            raise TypeError(
                f"transform returned {kind(inputs)}; it must return the batch of inputs, as tensors"
            )
        if length(inputs) != size:
            raise ValueError(
                f"transform turned {size} inputs into {length(inputs)}; it must return as many"
            )
        if self._check is not None:
            self._check(inputs)
            self._check = None
        return inputs


def mixing(mixup: float, cutmix: float, num_classes: int) -> Mix | None:
    """Mixup and CutMix of training batches, by torchvision; None where neither is asked for.

    The function that is returned takes inputs `[B, C, H, W]` and labels `[B]`, and returns mixed
    inputs and the shares of the classes in them, `[B, C]`. For each batch torch draws whether Mixup
    (Zhang et al. 2018) or CutMix (Yun et al. 2019) is applied.

    Args:
        mixup, cutmix: alphas of their Beta distributions; 0 for none.

    Raises:
        ImportError: torchvision is not installed, or cannot be imported.
    """
    alphas = {"MixUp": mixup, "CutMix": cutmix}
    if not any(alphas.values()):
        return None
    v2 = import_library("torchvision.transforms.v2", "mixup and cutmix need")
    ways = [getattr(v2, name)(alpha=a, num_classes=num_classes) for name, a in alphas.items() if a]
    draw = v2.RandomChoice(ways)

    def mix(inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        check_mixed(inputs)  # once more: a transform may have changed them
        return draw(inputs, labels)

    return mix


def check_mixed(inputs: Any) -> None:
    """Raise ValueError where training inputs are nothing to mix."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        raise ValueError(
            f"mixup and cutmix are for images [B, C, H, W]; train has {kind(inputs)}: drop them"
        )
