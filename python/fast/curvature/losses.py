"""What curvature needs of a loss: its gradient and its Hessian in the network's output.

Cross-entropy and squared error have closed forms; any other function of (output, target) is
differentiated twice by autograd, at the output only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.curvature.space import dot
from fastkernels import cross_entropy_hvp_, cross_entropy_quad

LossFn = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class OutputHessian:
    """A symmetric matrix at the network's output, for K vectors u [K, *output] at once.

    `product(u)` is [K, *output] and may overwrite u; `quad(u)` is u^T H u, [K], float64.
    """

    product: Callable[[Tensor], Tensor]
    quad: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, product: Callable[[Tensor], Tensor]) -> OutputHessian:
        return cls(product, lambda u: dot([u], [product(u.clone())]))


class Loss:
    """A scalar loss of (output, target), the mean or the sum over a batch.

    `weight` is what one batch weighs in the mean over all data: its number of samples, or the
    loss's own denominator where that is known, so that the weighted mean over the batches is the
    loss of all data at once. With `reduction="sum"` every batch weighs one and nothing is divided.
    """

    def __init__(self, fn: LossFn, reduction: str = "mean"):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum'; got {reduction!r}")
        self.fn = fn
        self.reduction = reduction

    def value(self, z: Tensor, y: Any) -> Tensor:
        loss = self.fn(z, y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return one number per batch; got {got}: reduce it")
        return loss.reshape(())

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        return float(size)

    def gradient(self, z: Tensor, y: Any) -> Tensor:
        """dL/dz, shaped as z."""
        z = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.value(z, y), z)
        return g

    def hessian(self, z: Tensor, y: Any) -> OutputHessian:
        """U [K, *z.shape] -> (d2L/dz2) U_k for every k."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.value(z, y), z, create_graph=True)
        if not g.requires_grad:
            return OutputHessian.of(torch.zeros_like)

        def product(u: Tensor) -> Tensor:
            out = [torch.autograd.grad(g, z, v, retain_graph=True)[0] for v in u]
            return torch.stack(out)

        return OutputHessian.of(product)

    def residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        """r [n, d] and c with: empirical Fisher = c * sum_i J_i^T r_i r_i^T J_i.

        The n rows of z are the samples, its first dimension.
        """
        size = z.shape[0]
        scale = float(size) if self.reduction == "mean" else 1.0
        rows = self.gradient(z, y).reshape(size, -1) * scale
        return rows, 1.0 / scale

    def rows(self, u: Tensor) -> Tensor:
        """[K, *z] -> [K, n, d], rows as in `residual`."""
        return u.flatten(2) if u.ndim > 2 else u[..., None]

    def unrows(self, u: Tensor, shape: torch.Size) -> Tensor:
        """The way back: [K, n, d] -> [K, *shape]."""
        return u.reshape(u.shape[0], *shape)

    def sample(self, z: Tensor, y: Any) -> Any:
        """Targets drawn from the network's own predictive distribution."""
        raise NotImplementedError(
            "the Monte-Carlo Fisher draws labels from the network's predictive distribution, which "
            "is known for cross-entropy and squared error; use kind='empirical', or fast.GGN"
        )

    def predict(self, z: Tensor, y: Any) -> Any:
        """The network's most likely target."""
        raise NotImplementedError(
            "the predicted label is known for cross-entropy and squared error; use labels='data'"
        )


class CrossEntropy(Loss):
    """torch.nn.functional.cross_entropy with any of its options.

    Per row with probabilities p the Hessian is a (diag(p) - p p^T), a = the row's share of the
    loss; label smoothing, class weights, ignored and soft labels only change a.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        self.class_weight = weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        super().__init__(self._cross_entropy, reduction)

    def _cross_entropy(self, z: Tensor, y: Any) -> Tensor:
        w = None if self.class_weight is None else self.class_weight.to(z)
        return F.cross_entropy(
            z,
            y,
            weight=w,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _row_scale(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """a [n] of every row before division by the denominator, and that denominator (0-d)."""
        if z.ndim < 1 or not isinstance(y, Tensor):
            raise ValueError("cross-entropy needs logits [N, C, ...] and a tensor of labels")
        classes = z.shape[1] if z.ndim > 1 else z.shape[0]
        w = self.class_weight
        w = torch.ones(classes, dtype=z.dtype, device=z.device) if w is None else w.to(z)
        smooth = self.label_smoothing
        if y.is_floating_point():
            soft = self.rows(y.to(z)[None])[0]
            scale = ((1 - smooth) * soft + smooth / classes) @ w
            return scale, scale.new_tensor(float(scale.numel()))
        y = y.reshape(-1)
        kept = y != self.ignore_index
        own = w[y.where(kept, y.new_zeros(()))] * kept
        scale = (1 - smooth) * own + smooth / classes * w.sum() * kept
        return scale, own.sum()

    def rows(self, u: Tensor) -> Tensor:
        """[K, *z] with classes in dimension 1 of z -> [K, n, C]."""
        if u.ndim == 2:
            return u[:, None]
        return u.flatten(1, -2) if u.ndim == 3 else u.movedim(2, -1).flatten(1, -2)

    def unrows(self, u: Tensor, shape: torch.Size) -> Tensor:
        if len(shape) <= 2:
            return u.reshape(u.shape[0], *shape)
        moved = (shape[0], *shape[2:], shape[1])
        return u.reshape(u.shape[0], *moved).movedim(-1, 2)

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        return float(self._row_scale(z, y)[1]) if isinstance(y, Tensor) else float(size)

    def scaled_rows(self, z: Tensor, y: Tensor) -> Tensor:
        """a / denominator, [n]: what each row's diag(p) - p p^T is multiplied by."""
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

    def residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        # Every label is a sample of its own: positions of a sequence are not added up.
        g = self.rows(self.gradient(z, y)[None])[0]
        scale = float(self._row_scale(z, y)[1]) if self.reduction == "mean" else 1.0
        return g * scale, 1.0 / scale

    def sample(self, z: Tensor, y: Any) -> Any:
        logits = self.rows(z.detach()[None])[0]
        return self._labels(torch.multinomial(torch.softmax(logits, -1), 1)[:, 0], z, y)

    def predict(self, z: Tensor, y: Any) -> Any:
        return self._labels(self.rows(z.detach()[None])[0].argmax(-1), z, y)

    def _labels(self, labels: Tensor, z: Tensor, y: Any) -> Tensor:
        shape = (z.shape[0], *z.shape[2:]) if z.ndim > 1 else ()
        labels = labels.reshape(shape)
        if isinstance(y, Tensor) and not y.is_floating_point():
            labels = labels.where(y.reshape(shape) != self.ignore_index, self.ignore_index)
        return labels


class SquaredError(Loss):
    """torch.nn.functional.mse_loss: mean or sum of (z - y)^2 over all entries."""

    def __init__(self, reduction: str = "mean"):
        super().__init__(functools.partial(F.mse_loss, reduction=reduction), reduction)

    def _factor(self, z: Tensor) -> float:
        return 2.0 / z.numel() if self.reduction == "mean" else 2.0

    def hessian(self, z: Tensor, y: Any) -> OutputHessian:
        factor = self._factor(z)
        return OutputHessian.of(lambda u: u * factor)

    def sample(self, z: Tensor, y: Any) -> Any:
        # The density with -log p = (z - y)^2 per sample mean: a Gaussian of variance d / 2.
        outputs = z[0].numel() if self.reduction == "mean" else 1
        return z.detach() + torch.randn_like(z) * (outputs / 2) ** 0.5

    def predict(self, z: Tensor, y: Any) -> Any:
        return z.detach()


def recognise(loss_fn: Any, reduction: str = "mean") -> Loss:
    """The closed form behind `loss_fn`, where there is one; else autograd's."""
    if isinstance(loss_fn, Loss):
        return loss_fn
    if loss_fn in ("cross_entropy", F.cross_entropy):
        return CrossEntropy(reduction=reduction)
    if loss_fn in ("mse", F.mse_loss):
        return SquaredError(reduction=reduction)
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        options = dict(loss_fn.keywords)
        chosen = options.pop("reduction", reduction)
        if chosen in ("mean", "sum"):
            if loss_fn.func is F.cross_entropy and not options.keys() - _CE_OPTIONS:
                return CrossEntropy(reduction=chosen, **options)
            if loss_fn.func is F.mse_loss and not options:
                return SquaredError(chosen)
    if type(loss_fn) is nn.CrossEntropyLoss and loss_fn.reduction in ("mean", "sum"):
        return CrossEntropy(
            loss_fn.weight, loss_fn.ignore_index, loss_fn.reduction, loss_fn.label_smoothing
        )
    if type(loss_fn) is nn.MSELoss and loss_fn.reduction in ("mean", "sum"):
        return SquaredError(loss_fn.reduction)
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function of (output, target), 'cross_entropy' or 'mse'; got "
            f"{loss_fn!r}"
        )
    return Loss(loss_fn, reduction)


_CE_OPTIONS = {"weight", "ignore_index", "label_smoothing"}
