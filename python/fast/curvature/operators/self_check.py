"""What only the operator of a network can check: data, dropout, denominators and derivatives."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fast.curvature.algorithms.check import Finding, compared
from fast.curvature.losses.denominators import joint, tolerance
from fast.curvature.losses.loss import Loss
from fast.curvature.network.batches import Batch, Batches
from fast.curvature.network.network import Network
from fast.curvature.network.parameter_space import Blocks
from fast.errors import first_line

# A difference has an error of its own, and the float64 copy is not the rounded network.
DIFFERENCE_RTOL = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 0.25,
}

# Number of batches that are put into one call with the first.
NUM_JOINED = 8

# The output, the target and the number of samples of one batch.
Answer = tuple[Tensor, Any, int]


def data_finding(data: Batches) -> Finding:
    """Whether two passes over the data give the same batches."""
    first, second = ([_digest(b) for b in data] for _ in range(2))
    detail = f"{len(first)} batches, the same in two passes"
    if first != second:
        detail = "batches differ between two passes over the data: turn shuffling and augmentation "
        detail += "off, or pass list(loader)"
    return Finding(name="data", ok=first == second, detail=detail)


def _digest(batch: Batch) -> str:
    digest = hashlib.blake2b()
    for leaf in pytree.tree_leaves((batch.inputs, batch.target)):
        if isinstance(leaf, Tensor):
            t = leaf.detach()
            t = torch.nested.to_padded_tensor(t, 0) if t.is_nested else t
            digest.update(repr((t.dtype, tuple(t.shape))).encode())
            digest.update(t.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def dropout_finding(network: Network) -> Finding:
    """Whether dropout is off: else the matrix is that of one random thinned network."""
    active = [
        name
        for name, module in network.model.named_modules()
        if module.training and _drop_probability(module) > 0
    ]
    if not active:
        return Finding(name="dropout", ok=True, detail="none active")
    detail = f"active in {active[:3]}: the products are of one random thinned network (seed "
    detail += f"{network.seed}); call model.eval() for the network itself"
    return Finding(name="dropout", ok=False, detail=detail)


def _drop_probability(module: nn.Module) -> float:
    """The rate of dropout in a module, 0 for one without."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    rate = getattr(module, "dropout", 0.0)  # LSTM, MultiheadAttention
    return float(rate) if isinstance(rate, int | float) else 0.0


def denominator_findings(loss: Loss, answers: Sequence[Answer]) -> list[Finding]:
    """Whether batches weigh as much as they do in the loss of two of them in one call."""
    batches = [(z, y, w) for z, y, size in answers if (w := loss.weight(z, y, size))]
    count, largest = 0, 0.0
    for z, y, weight in batches[1 : 1 + NUM_JOINED]:
        first, first_y, unit = batches[0]
        try:
            both = joint(loss.value, (first, first_y), (z, y))
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue  # batches of different shapes cannot be joined
        share = 1.0 if loss.reduction == "sum" else unit / (unit + weight)
        if both.first == both.first:
            count += 1
            largest = max(largest, abs(both.first - share) if both.additive else 1.0)
    if not count:
        return []
    detail = f"{count} batches, each in one call with the first, off by {largest:.1e}"
    if not (ok := largest < tolerance(batches[0][0])):
        detail += ": the loss of all data is another mean than the one over batches"
    return [Finding(name="denominators", ok=ok, detail=detail)]


def difference_tolerance(dtype: torch.dtype, rtol: float) -> float:
    """The largest relative error to accept of a difference, for parameters of this type."""
    return max(rtol, DIFFERENCE_RTOL[dtype])


def difference_findings(error: Callable[[], float | None], limit: float) -> list[Finding]:
    """Whether products are those of a difference; nothing where there is no difference.

    Args:
        error: measures the relative error of a product, on a copy of the network in float64.
        limit: the largest error to accept.
    """
    name, detail = "difference", "central difference in float64"
    try:
        off = error()
    except RuntimeError as failure:
        detail = f"no difference: a copy of the network in float64 fails ({first_line(failure)})"
        return [Finding(name=name, ok=True, detail=detail)]
    if off is None:
        return []
    if off > limit:
        detail += " (it moves what the network detaches and the row padding_idx, and over kinks)"
    return [compared(name, off, detail, limit)]


def central_difference(
    model: nn.Module, direction: dict[str, Tensor], function: Callable[[], Blocks]
) -> Blocks:
    """(f(w + h v) - f(w - h v)) / 2h for each tensor of f, with w the parameters of `model`.

    Args:
        direction: v, by name of parameter.
    """
    params = dict(model.named_parameters())
    norm, length = (
        sum(float(t.detach().double().norm()) ** 2 for t in tensors.values()) ** 0.5
        for tensors in (direction, params)
    )
    step = 1e-5 * max(1.0, length) / norm

    def at(sign: float) -> Blocks:
        with torch.no_grad():
            for name, v in direction.items():
                params[name].add_(v, alpha=sign * step)
        values = function()
        with torch.no_grad():
            for name, v in direction.items():
                params[name].sub_(v, alpha=sign * step)
        return values

    return [(a - b) / (2 * step) for a, b in zip(at(1.0), at(-1.0), strict=True)]


def in_float64(model: nn.Module, data: Batches) -> tuple[nn.Module, Batches]:
    """Copies of a model and of its data in float64.

    deepcopy refuses modules that keep a computed tensor (old-style weight and spectral norm): those
    tensors are detached, for the forward pass computes them anew.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    batches = [Batch(_double(b.inputs), _double(b.target)) for b in data]
    return copy.deepcopy(model, memo).double(), Batches(batches, data.labels)


def _double(tree: object) -> object:
    return pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )
