"""The diagonal of a Fisher matrix, and by it of a GGN, from squared gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast.curvature.algorithms.arguments import check_whole
from fast.curvature.losses.loss import Loss
from fast.curvature.losses.recognise import recognise
from fast.curvature.network.batches import Batch, Batches
from fast.curvature.network.network import Network, Params, laid_out
from fast.curvature.operators.mean import WeightedMean
from fast.curvature.operators.sample_gradients import squared_sample_gradients
from fast.data.trees import leaves

LABELS = ("sampled", "predicted", "data")
# Gives the rows r [n, d] of an output and their factor c, as `Loss.residual` does.
Residual = Callable[[Tensor, Any], tuple[Tensor, float]]


def fisher_diagonal(
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    params: Params = None,
    *,
    labels: str = "sampled",
    method: str = "auto",
    num_draws: int | None = None,
    reduction: str = "mean",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher matrix, F_ii = mean over samples of (dL / dw_i)^2, one tensor per
    parameter, shaped like it.

    With labels drawn from the network itself it is an unbiased estimate of the diagonal of the GGN
    (cross-entropy, squared error), and the data need no labels: x alone, or batches of x, will do.

    Args:
        labels: "sampled" from the network's predictive distribution, its most likely "predicted"
            ones (biased: a sure network then shows no curvature), or those of the "data" (the
            empirical Fisher).
        method: "samples" squares the gradient of every sample: exact given the labels, about
            2 to 4 gradients per draw. "signs" squares the gradient of a randomly signed sum over
            the batch: exact in expectation, one gradient per draw, any network and batch norm in
            train mode; relative standard deviation sqrt(2 / draws) per entry. "auto" takes samples
            where the network allows per-sample gradients.
        num_draws: label draws per sample ("samples", default 1) or signed sums ("signs", default
            8); each draws labels afresh.

    Raises:
        ValueError: an option is unknown, or the labels that it needs are missing.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {LABELS}; got {labels!r}")
    if method not in ("auto", "samples", "signs"):
        raise ValueError(f"method must be 'auto', 'samples' or 'signs'; got {method!r}")
    network = Network(model, params, seed)
    loss = recognise(loss_fn, reduction)
    mixing = mixes_samples(network.model)
    if method == "samples" and mixing:
        raise ValueError(
            f"{mixing} mixes the samples of a batch, so there is no gradient of one sample: call "
            "model.eval(), or use method='signs'"
        )
    by_samples = method == "samples" or (method == "auto" and not mixing)
    squares = _sample_squares if by_samples else _signed_squares
    draws = num_draws if num_draws is not None else (1 if by_samples else 8)
    check_whole(num_draws=draws, least=1)
    residual: Residual = loss.sampled_residual if labels == "sampled" else loss.residual

    mean = WeightedMean()
    for index, batch in enumerate(Batches(data, labels=labels == "data")):
        batch = batch.to(network.space.device)
        if by_samples and any(x.is_nested for x in leaves(batch.inputs)):
            raise ValueError("nested tensors do not come apart into samples: use method='signs'")
        if labels == "data" and batch.target is None:
            raise ValueError("labels='data' needs labelled batches (x, y); or use 'sampled'")
        with network.scope(index, differentiable_twice=False):
            part, weight = squares(network, loss, residual, batch, labels == "predicted", draws)
        mean.add(part, weight, loss.reduction)
    return dict(zip(network.names, [t.detach() for t in mean.result()], strict=True))


def mixes_samples(model: nn.Module) -> str:
    """The name of a module whose output for one sample depends on the others, or ""."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            return f"{name} ({type(module).__name__} in train mode)"
    return ""


def _signed_squares(
    network: Network, loss: Loss, residual: Residual, batch: Batch, predict: bool, draws: int
) -> tuple[list[Tensor], float]:
    """Sum over draws of (J^T sum_n s_n r_n)^2 with random signs s, and the weight of the batch."""
    weights = network.leaves()
    params = network.selected(weights)
    output, y = network.answers(weights, batch, loss)
    z = output.detach()
    network.refuse_penalty(loss, z, y)
    y = loss.predict(z, y) if predict else y
    total = [torch.zeros_like(p) for p in params]
    for draw in range(draws):
        r, scale = residual(z, y)
        signs = torch.randint(0, 2, (r.shape[0], 1), device=r.device).to(r) * 2 - 1
        cotangent = loss.unrows((r * signs)[None], z.shape)[0]
        grads = torch.autograd.grad(
            output, params, cotangent, retain_graph=draw + 1 < draws, allow_unused=True
        )
        for t, g in zip(total, grads, strict=True):
            if g is not None:
                t.addcmul_(g, g, value=scale / draws)
    return total, loss.weight(z, y, batch.size)


def _sample_squares(
    network: Network, loss: Loss, residual: Residual, batch: Batch, predict: bool, draws: int
) -> tuple[list[Tensor], float]:
    """Sum over draws and samples n of (J_n^T r_n)^2, and the weight of the batch."""
    weights = network.leaves()
    with torch.no_grad():
        output = network.outputs(weights, batch.inputs)
    dim = network.class_dim(output, batch, loss)
    z, y = laid_out(output, batch.target, dim)
    network.refuse_penalty(loss, z, y)
    y = loss.predict(z, y) if predict else y
    total = [torch.zeros_like(p) for p in network.selected(weights)]
    for _ in range(draws):
        r, scale = residual(z, y)
        cotangent = loss.unrows(r[None], z.shape)[0]
        cotangent = cotangent if dim == 1 else cotangent.movedim(1, dim)
        part = squared_sample_gradients(network, weights, batch, cotangent)
        torch._foreach_add_(total, part, alpha=scale / draws)
    return total, loss.weight(z, y, batch.size)
