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

from fast.curvature.blame import SecondDerivativeError, cut_off
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
            # A cotangent that requires a gradient: a backward marked once_differentiable is silent
            # about what it saved, but not about that.
            value = self.value(z, y)
            one = torch.ones_like(value, requires_grad=True)
            (g,) = torch.autograd.grad(value, z, one, create_graph=True, allow_unused=True)
            if cut_off([g]):
                raise SecondDerivativeError(
                    "loss_fn cannot be differentiated twice: its backward is marked "
                    "once_differentiable. Write it with operations that can, or use "
                    "fast.curvature.Fisher(..., kind='empirical')"
                )
        if g is None or not g.requires_grad:
            return OutputHessian.of(torch.zeros_like)

        def product(u: Tensor) -> Tensor:
            try:
                out = [
                    torch.autograd.grad(
                        g, z, v, retain_graph=True, allow_unused=True, materialize_grads=True
                    )[0]
                    for v in u
                ]
            except RuntimeError as error:
                raise SecondDerivativeError(
                    f"loss_fn cannot be differentiated twice: {error}. Write it with operations "
                    "that can, or use fast.curvature.Fisher(..., kind='empirical')"
                ) from error
            return torch.stack(out)

        return OutputHessian.of(product)

    def residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        """r [n, d] and c with: empirical Fisher = c * sum_i J_i^T r_i r_i^T J_i.

        The n rows of z are the samples, its first dimension.
        """
        size = z.shape[0] if z.ndim else 1
        scale = float(size) if self.reduction == "mean" else 1.0
        rows = self.gradient(z, y).reshape(size, -1) * scale
        return rows, 1.0 / scale

    def sampled_residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        """As `residual`, with targets drawn so that its expectation is the GGN.

        y: the given target, for what it says besides the label (weights, ignored); may be None.
        """
        return self.residual(z, self.sample(z, y))

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
        _needs_target(y)
        w = None if self.class_weight is None else self.class_weight.to(z)
        return F.cross_entropy(
            z,
            y if y.is_floating_point() else y.long(),  # torch wants int64, and takes uint8 on CPUs
            weight=w,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _row_scale(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """a [n] of every row before division by the denominator, and that denominator (0-d).

        Without labels (y None), what is expected of them where the network draws them itself.
        """
        if z.ndim < 1 or not (y is None or isinstance(y, Tensor)):
            raise ValueError("cross-entropy needs logits [N, C, ...] and a tensor of labels")
        classes = z.shape[1] if z.ndim > 1 else z.shape[0]
        w = self.class_weight
        w = torch.ones(classes, dtype=z.dtype, device=z.device) if w is None else w.to(z)
        smooth = self.label_smoothing
        if y is None:
            own = torch.softmax(self.rows(z[None])[0], -1) @ w
            return (1 - smooth) * own + smooth / classes * w.sum(), own.sum()
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
        y = y.reshape(-1)
        y = y.long()
        kept = y != self.ignore_index
        plain = self.class_weight is None
        own = kept.to(w) if plain else w[y.where(kept, y.new_zeros(()))] * kept
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
        return float(self._row_scale(z.detach(), y)[1])

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
        if not scale:  # every label is ignored
            return torch.zeros_like(g), 1.0
        return g * scale, 1.0 / scale

    def sampled_residual(self, z: Tensor, y: Any) -> tuple[Tensor, float]:
        # The row's own weight belongs to the given label. With that of the drawn label, squared,
        # the expectation would be another matrix than the GGN, a (diag(p) - p p^T) in every row.
        logits = self.rows(z.detach()[None])[0]
        p = torch.softmax(logits, -1)
        scale, denominator = self._row_scale(z.detach(), y)
        drawn = F.one_hot(torch.multinomial(p, 1)[:, 0], p.shape[-1]).to(p)
        whole = float(denominator) if self.reduction == "mean" else 1.0
        return (p - drawn) * scale.sqrt()[:, None], 1.0 / (whole or 1.0)

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
        super().__init__(self._squares, reduction)

    def _squares(self, z: Tensor, y: Any) -> Tensor:
        _needs_target(y)
        return F.mse_loss(z, y, reduction=self.reduction)

    def weight(self, z: Tensor, y: Any, size: int) -> float:
        # torch divides by the number of entries, and samples may have more or fewer of them.
        return float(_entries(z, y))

    def hessian(self, z: Tensor, y: Any) -> OutputHessian:
        # A target that z broadcasts against counts every entry of z so many times.
        mean = self.reduction == "mean"
        factor = 2.0 / max(z.numel(), 1) * (1 if mean else _entries(z, y))
        return OutputHessian.of(lambda u: u * factor)

    def sample(self, z: Tensor, y: Any) -> Any:
        # The density with -log p = (z - y)^2 per sample mean: a Gaussian of variance d / 2.
        size = max(z.shape[0] if z.ndim else 1, 1)
        outputs = z.numel() / size if self.reduction == "mean" else _entries(z, y) / z.numel()
        return z.detach() + torch.randn_like(z) * (outputs / 2) ** 0.5

    def predict(self, z: Tensor, y: Any) -> Any:
        return z.detach()


def _entries(z: Tensor, y: Any) -> int:
    """Entries of z - y; of z where there is no y."""
    if not isinstance(y, Tensor):
        return z.numel()
    return torch.broadcast_shapes(z.shape, y.shape).numel()


def _needs_target(y: Any) -> None:
    if not isinstance(y, Tensor):
        raise ValueError(
            f"the loss needs labels, a tensor; got {type(y).__name__}: give data as batches (x, y)"
        )


def recognise(loss_fn: Any, reduction: str = "mean") -> Loss:
    """The closed form behind `loss_fn`, where there is one; else autograd's.

    The known losses are summed where either `reduction` or their own is "sum".
    """
    if isinstance(loss_fn, Loss):
        return loss_fn
    if loss_fn in ("cross_entropy", F.cross_entropy):
        return CrossEntropy(reduction=reduction)
    if loss_fn in ("mse", F.mse_loss):
        return SquaredError(reduction=reduction)
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        options = dict(loss_fn.keywords)
        chosen = _either(options.pop("reduction", reduction), reduction)
        if chosen in ("mean", "sum"):
            if loss_fn.func is F.cross_entropy and not options.keys() - _CE_OPTIONS:
                return CrossEntropy(reduction=chosen, **options)
            if loss_fn.func is F.mse_loss and not options:
                return SquaredError(chosen)
    if type(loss_fn) is nn.CrossEntropyLoss and loss_fn.reduction in ("mean", "sum"):
        return CrossEntropy(
            loss_fn.weight,
            loss_fn.ignore_index,
            _either(loss_fn.reduction, reduction),
            loss_fn.label_smoothing,
        )
    if type(loss_fn) is nn.MSELoss and loss_fn.reduction in ("mean", "sum"):
        return SquaredError(_either(loss_fn.reduction, reduction))
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function of (output, target), 'cross_entropy' or 'mse'; got "
            f"{loss_fn!r}"
        )
    return Loss(loss_fn, reduction)


def _either(own: str, reduction: str) -> str:
    return reduction if (own, reduction) == ("mean", "sum") else own


_CE_OPTIONS = {"weight", "ignore_index", "label_smoothing"}
