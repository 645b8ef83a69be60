"""Cross-entropy whose micro-batches add up to the batch: accumulating gradients changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.data.dataset import Data
from fast.data.labels import check_labels

# Logits `[B, C]` and labels of a batch -> the mean over its samples, `[]`.
Loss = Callable[[Tensor, Tensor], Tensor]


def class_weights(
    option: str | tuple[float, ...] | None, data: Data, num_classes: int
) -> Tensor | None:
    """Weights `[C]` of the classes, or None.

    Args:
        option: None, one weight per class, or `"balanced"`: N / (C * count of the class), the
            convention of scikit-learn; classes without samples get 0.

    Raises:
        ValueError: the number of weights is wrong, one is negative or not finite, or all classes in
            the data have weight 0; or there are no labels to balance by.
    """
    if option is None:
        return None
    if option == "balanced":
        labels = data.labels if data.labels is not None else _targets(data)
        count = torch.bincount(labels, minlength=num_classes).float()
        return torch.where(count > 0, len(labels) / (num_classes * count), 0.0)
    if isinstance(option, str):
        raise ValueError(
            f"class_weights must be 'balanced' or one weight per class; got {option!r}"
        )
    weights = torch.as_tensor(option, dtype=torch.float32)
    if weights.shape != (num_classes,):
        raise ValueError(f"class_weights has {weights.numel()} weights for {num_classes} classes")
    wrong = ~(weights.isfinite() & (weights >= 0))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"class_weights must be finite and not negative; class {first} has "
            f"{float(weights[first]):g}"
        )
    present = weights if data.labels is None else weights[data.labels.unique()]
    if not present.any():
        raise ValueError(f"class_weights are 0 for every class in {data.name}: nothing would learn")
    return weights


def _targets(data: Data) -> Tensor:
    targets = data.recorded_targets()
    if targets is None:
        raise ValueError(
            "class_weights='balanced' needs the labels: pass (x, y) tensors, a Dataset with "
            "`targets`, or the weights themselves"
        )
    return check_labels(targets, None, data.name)


class TargetLoss:
    """Weighted, smoothed cross-entropy whose micro-batch parts add up to the batch's mean.

    Args:
        weights: `[C]` or None.
        smoothing: label smoothing in 0..1.
    """

    def __init__(self, weights: Tensor | None, smoothing: float) -> None:
        self.weights, self.smoothing = weights, smoothing

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over a batch: logits `[B, C]`, labels `[B]` or shares of classes `[B, C]`."""
        return self.part(logits, labels, self.denominator(labels))

    def denominator(self, labels: Tensor) -> Tensor | int:
        """What the mean over a whole batch divides by."""
        if self.weights is None:
            return len(labels)
        # A batch of classes of weight 0 has no loss; 0 / 0 would spoil the weights.
        weights = labels @ self.weights if labels.dim() == 2 else self.weights[labels]
        return weights.sum().clamp_min(1e-12)

    def part(self, logits: Tensor, labels: Tensor, denominator: Tensor | int) -> Tensor:
        total = F.cross_entropy(
            logits.float(),
            labels,
            weight=self.weights,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        return total / denominator
