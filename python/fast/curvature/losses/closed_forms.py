"""Losses of torch with known denominators, and mostly with closed forms of their Hessians."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.curvature.losses.loss import Loss, LossFn, OutputHessian, parts
from fastkernels import cross_entropy_hvp_, cross_entropy_quad


class _OfClasses(Loss):
    """A loss of outputs [N, C, ...] and class labels [N, ...], each with the weight of its class.

    Outputs may also have their classes last, [N, ..., C], as token logits do. The shape of the
    labels tells, or the network's head where there are no labels.
    """

    def __init__(self, fn: LossFn, weight: Tensor | None, ignore_index: int, reduction: str):
        self.class_weight = weight
        self.ignore_index = ignore_index
        super().__init__(fn, reduction)

    def state(self) -> list[Any]:
        return [self.class_weight, self.ignore_index, self.reduction]

    def _options(self, z: Tensor, y: Any) -> dict[str, Any]:
        """The keywords of torch's own function."""
        _needs_target(y)
        w = None if self.class_weight is None else self.class_weight.to(z)
        return {"weight": w, "ignore_index": self.ignore_index, "reduction": self.reduction}

    of_classes = True

    def class_dim(self, z: Tensor, y: Any, default: int | None = None) -> int:
        if z.ndim <= 2:
            return 1
        if not isinstance(y, Tensor):
            return default or 1
        if not y.is_floating_point():
            last = y.shape == z.shape[:-1] != (z.shape[0], *z.shape[2:])
        elif last := y.shape == z.shape:
            # Probabilities sum to one over the classes.
            one, other = (float((y.sum(d) - 1).abs().max()) for d in (-1, 1))
            last = one < 1e-2 < other
        return z.ndim - 1 if last else 1

    def rows(self, u: Tensor) -> Tensor:
        """Vectors [K, *z] as [K, n, C]; z has its classes in dimension 1."""
        if u.ndim == 2:
            return u[:, None]
        return u.flatten(1, -2) if u.ndim == 3 else u.movedim(2, -1).flatten(1, -2)

    def unrows(self, u: Tensor, shape: torch.Size) -> Tensor:
        if len(shape) <= 2:
            return u.reshape(u.shape[0], *shape)
        classes_last = (shape[0], *shape[2:], shape[1])
        return u.reshape(u.shape[0], *classes_last).movedim(-1, 2)

    def _class_weights(self, z: Tensor) -> Tensor:
        """The weight of each class, [C]."""
        classes = z.shape[1] if z.ndim > 1 else z.shape[0]
        w = self.class_weight
        return torch.ones(classes, dtype=z.dtype, device=z.device) if w is None else w.to(z)

    def _label_weights(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each label counts, and the weight of its class (0 where not), both [n]."""
        y = y.reshape(-1).long()
        counts = y != self.ignore_index
        w = self._class_weights(z)
        if bool((counts & ((y < 0) | (y >= len(w)))).any()):
            raise ValueError(
                f"labels must be classes 0..{len(w) - 1}, or {self.ignore_index} for none; got "
                f"{int(y.min())}..{int(y.max())}"
            )
        if self.class_weight is None:
            return counts, counts.to(w)
        return counts, w[y.where(counts, y.new_zeros(()))] * counts

    def residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        # Every label is a sample: positions of a sequence are not added up.
        g = self.rows(self.gradient(z, y)[None])[0]
        scale = self.weight(z, y, len(z)) if self.reduction == "mean" else 1.0
        if not scale:  # every label is ignored
            return torch.zeros_like(g), 1.0
        return g * scale, 1.0 / scale


class CrossEntropy(_OfClasses):
    """torch.nn.functional.cross_entropy with any of its options.

    The Hessian of a row with probabilities p is a (diag(p) - p p^T), with a the row's share of the
    loss; label smoothing, class weights, ignored and soft labels only change a.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        self.label_smoothing = label_smoothing
        super().__init__(self._cross_entropy, weight, ignore_index, reduction)

    def state(self) -> list[Any]:
        return [*super().state(), self.label_smoothing]

    def _cross_entropy(self, z: Tensor, y: Any) -> Tensor:
        options = self._options(z, y)
        # torch wants int64, and takes uint8 on CPUs.
        y = y if y.is_floating_point() else y.long()
        return F.cross_entropy(z, y, label_smoothing=self.label_smoothing, **options)

    def _row_scale(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The share a [n] of every row, times the denominator, and that denominator (0-d).

        Without labels (y None) both are their expectations over labels drawn from the network.
        """
        if z.ndim < 1 or not (y is None or isinstance(y, Tensor)):
            raise ValueError("cross-entropy needs logits [N, C, ...] and a tensor of labels")
        w = self._class_weights(z)
        classes, smooth = len(w), self.label_smoothing
        if y is None:
            mean_weight = torch.softmax(self.rows(z[None])[0], -1) @ w
            return (1 - smooth) * mean_weight + smooth / classes * w.sum(), mean_weight.sum()
        if y.is_floating_point():
            if y.shape != z.shape:
                raise ValueError(
                    f"soft labels must have the shape of the logits, {list(z.shape)}; got "
                    f"{list(y.shape)} (class labels are integers; two batches without labels are "
                    "[(x1, None), (x2, None)])"
                )
            soft = self.rows(y.to(z)[None])[0]
            scale = ((1 - smooth) * soft + smooth / classes) @ w
            return scale, scale.new_tensor(float(scale.numel()))
        counts, weights = self._label_weights(z, y)
        scale = (1 - smooth) * weights + smooth / classes * w.sum() * counts
        return scale, weights.sum()

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        return float(self._row_scale(z.detach(), y)[1])

    def scaled_rows(self, z: Tensor, y: Tensor) -> Tensor:
        """The share a [n] of every row in the loss."""
        scale, denominator = self._row_scale(z, y)
        return scale / denominator if self.reduction == "mean" else scale

    def hessian(self, z: Tensor, y: Any) -> OutputHessian:
        z = z.detach()
        logits = self.rows(z[None])[0]
        p = torch.softmax(logits, -1).contiguous()
        scale, shape = self.scaled_rows(z, y), z.shape

        def product(u: Tensor) -> Tensor:
            rows = self.rows(u).contiguous()
            cross_entropy_hvp_(rows, p, scale)
            return self.unrows(rows, shape)

        def quad(u: Tensor) -> Tensor:
            return cross_entropy_quad(self.rows(u).contiguous(), p, scale)

        return OutputHessian(product, quad)

    def sampled_residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        # The row keeps the weight of the label in the data. With that of the drawn label, squared,
        # the expectation would not be the GGN, a (diag(p) - p p^T) in every row.
        logits = self.rows(z.detach()[None])[0]
        p = torch.softmax(logits, -1)
        scale, denominator = self._row_scale(z.detach(), y)
        one_hot = F.one_hot(torch.multinomial(p, 1)[:, 0], p.shape[-1]).to(p)
        whole = float(denominator) if self.reduction == "mean" else 1.0
        return (p - one_hot) * scale.sqrt()[:, None], 1.0 / (whole or 1.0)

    def predict(self, z: Tensor, y: Any) -> Any:
        """The likeliest labels, of which those are ignored that are in y."""
        shape = (z.shape[0], *z.shape[2:]) if z.ndim > 1 else ()
        labels = self.rows(z.detach()[None])[0].argmax(-1).reshape(shape)
        if isinstance(y, Tensor) and not y.is_floating_point():
            labels = labels.where(y.reshape(shape) != self.ignore_index, self.ignore_index)
        return labels


class NegativeLogLikelihood(_OfClasses):
    """torch.nn.functional.nll_loss of log-probabilities: linear in them, so its GGN is zero."""

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
    ):
        super().__init__(self._nll, weight, ignore_index, reduction)

    def _nll(self, z: Tensor, y: Any) -> Tensor:
        return F.nll_loss(z, y.long(), **self._options(z, y))

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        _needs_target(y)
        return float(self._label_weights(z, y)[1].sum())


class Elementwise(Loss):
    """A loss of torch that is a mean or a sum over all entries of output and target.

    Args:
        fn: the loss with its own options.
        fn_reduction: whether `fn` is a "mean" or a "sum".
        reduction: which of them this loss is to be.
    """

    def __init__(self, fn: LossFn, fn_reduction: str, reduction: str):
        super().__init__(self._reduced, reduction)
        self.function, self.fn_reduction = fn, fn_reduction

    def state(self) -> list[Any]:
        return [*parts(self.function), self.fn_reduction, self.reduction]

    def _reduced(self, z: Tensor, y: Any) -> Tensor:
        _needs_target(y)
        loss = self.function(z, y)
        return loss if self.reduction == self.fn_reduction else loss * _entries(z, y)

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        # torch divides by the number of entries, and samples may differ in how many they have.
        return float(_entries(z, y))

    def per_sample(self, z: Tensor, y: Any, size: int) -> float:
        return float(size) if self.reduction == "mean" else 1.0


class SquaredError(Elementwise):
    """torch.nn.functional.mse_loss: mean or sum of (z - y)^2 over all entries."""

    def __init__(self, reduction: str = "mean"):
        super().__init__(F.mse_loss, "mean", reduction)

    def hessian(self, z: Tensor, y: Any) -> OutputHessian:
        # A target that z broadcasts against counts every entry of z several times.
        mean = self.reduction == "mean"
        factor = 2.0 / max(z.numel(), 1) * (1 if mean else _entries(z, y))
        return OutputHessian.of(lambda u: u * factor)

    def sample(self, z: Tensor, y: Any) -> Any:
        # The density p with -log p = the sample's mean of (z - y)^2: a Gaussian of variance d / 2.
        size = max(z.shape[0] if z.ndim else 1, 1)
        outputs = z.numel() / size if self.reduction == "mean" else _entries(z, y) / z.numel()
        return z.detach() + torch.randn_like(z) * (outputs / 2) ** 0.5

    def predict(self, z: Tensor, y: Any) -> Any:
        return z.detach()


def _entries(z: Tensor, y: Any) -> int:
    """The number of entries of z - y, or of z where there is no y."""
    if not isinstance(y, Tensor):
        return z.numel()
    return torch.broadcast_shapes(z.shape, y.shape).numel()


def _needs_target(y: Any) -> None:
    if not isinstance(y, Tensor):
        raise ValueError(
            f"the loss needs labels, a tensor; got {type(y).__name__}: give data as batches (x, y)"
        )
