"""Inputs made from a pretrained network, which stand in for source inputs where there are none.

Batch norm remembers the mean and variance that each channel had in training. Inputs of the target
are optimised until every batch norm sees these again and the head is sure of a class that was drawn
for each of them (DeepInversion, Yin et al. 2020, arXiv 1912.08795, which starts from noise and asks
for smooth pictures). The network computes for them much of what it computes for source inputs, and
that is what is to be kept. From the target's letters ResNet-20 had inputs in 20 steps that kept its
source as well as those from noise in 100.

The target's inputs as they are go with them: docs/no-source-data.md has what each of the two keeps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fast.adapt.defaults import own_beside_synthetic
from fast.data.source_inputs import LEAST
from fast.heads.forward import check_takes, forward_logits, hooked, unwrap
from fast.heads.replace import task_head

log = logging.getLogger("fast")

RATE = 0.1
# Weight of the head's cross-entropy beside the divergence. At 1 the divergence ended at 0.17 nats,
# more than that of the target's own letters; at this weight at 0.07.
SURE = 0.1


def synthetic_inputs(
    model: nn.Module,
    start: Tensor,
    *,
    count: int = 256,
    own: int | None = None,
    steps: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Inputs to pass as `source_inputs` where there are no source data.

    They are made once for a network and a target, and can be stored by `torch.save`. Each synthetic
    input costs as much as `steps` training samples.

    Args:
        model: a pretrained network with batch norm, before it is adapted; it is not changed.
        start: all training inputs of the target `[N, ...]`, at least 2, as the network takes them.
            The synthetic ones begin as these, in random order and again where there are too few,
            and keep their range.
        count: how many to make.
        own: how many inputs of `start`, at most N, go with them as they are (default: as many as
            synthetic ones with 2,000 training inputs and more, fewer in proportion with fewer,
            which the head learns by heart and then holds the backbone for nothing).
        steps: optimisation steps of each batch.
        batch_size: synthetic inputs of a batch, at most: memory. The statistics are those of a
            batch, so that small ones make worse inputs.
        seed: of the order and the classes.

    Returns:
        inputs `[count + own, ...]` in random order, on the network's device, with the dtype of
        `start`.

    Raises:
        TypeError: `start` is not a tensor of floating-point numbers.
        ValueError: the network has no batch norm with running statistics, is adapted already, does
            not take these inputs, or answers with numbers that are not finite; or a number is
            too small.
    """
    model = unwrap(model)
    _check(model, start, count=count, own=own, steps=steps, batch_size=batch_size)
    if own is None:
        own = own_beside_synthetic(count, len(start))
    norms, start, device = _norms(model), start.detach(), next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    inputs, divergences = [], []
    for rows in _rounds(len(start), count, generator).tensor_split(-(-count // batch_size)):
        first = start[rows.to(start.device)].to(device)
        made, divergence = _optimised(model, norms, first, steps, generator)
        inputs.append(made)
        divergences.append(divergence)
    rows = torch.randperm(len(start), generator=generator)[:own]
    inputs.append(start[rows.to(start.device)].to(device))
    log.info(
        "%d synthetic inputs and %d own ones; a channel's distribution differs from that in "
        "training by %.3f nats in the mean with the synthetic ones, by %.3f with your own",
        count,
        len(rows),
        sum(divergences) / len(divergences),
        _own_divergence(model, norms, start[:batch_size].to(device)),
    )
    together = torch.cat(inputs)
    return together[torch.randperm(len(together), generator=generator).to(device)]


def _rounds(number: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of the first `number` whole numbers, in random order, each as often as the others."""
    rounds = [torch.randperm(number, generator=generator) for _ in range(-(-size // number))]
    return torch.cat(rounds)[:size]


def _check(model: nn.Module, start: Tensor, *, own: int | None, **numbers: int) -> None:
    if not isinstance(start, Tensor) or not start.is_floating_point():
        kind = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(
            f"start must be a tensor of floating-point inputs; got {kind}: texts and other indices "
            "cannot be optimised"
        )
    if task_head(model) is not None:
        raise ValueError("model is adapted already; make synthetic inputs before fast.Adaptation")
    if not _norms(model):
        raise ValueError(
            "model has no batch norm with running statistics to make inputs from; leave "
            "source_inputs out, and the target's own inputs are kept"
        )
    least = {"count": LEAST, "own": 0, "steps": 1, "batch_size": 2}
    for name, value in ({"own": 0 if own is None else own} | numbers).items():
        if not isinstance(value, int) or value < least[name]:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least[name]}")
    if len(start) < 2:
        raise ValueError(f"start has {len(start)} inputs; give at least 2")
    check_takes(model, start, "start")
    if not float(start.std()) > 0:  # NaN, too
        raise ValueError("start: all inputs are the same number, or not finite; give real inputs")


def _norms(model: nn.Module) -> list[_BatchNorm]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [m for m in norms if m.running_mean is not None and m.running_var is not None]


def _optimised(
    model: nn.Module,
    norms: list[_BatchNorm],
    start: Tensor,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """A batch of inputs that began as `start`, and how far what the norms see of them is from what
    they saw in training, in nats."""
    low, high = start.aminmax()
    inputs = start.clone().requires_grad_()
    labels: Tensor | None = None
    optimizer = torch.optim.Adam([inputs], lr=RATE * float(start.std()))
    divergence = math.inf
    with _seen_by(model, norms) as seen, torch.enable_grad():
        for _ in range(steps):
            seen.clear()
            logits = forward_logits(model, inputs).float()
            if labels is None:
                labels = _classes(logits, generator)
            distance = torch.stack(seen).mean()
            loss = distance + SURE * F.cross_entropy(logits, labels)
            (inputs.grad,) = torch.autograd.grad(loss, inputs)
            optimizer.step()
            with torch.no_grad():
                inputs.clamp_(low, high)
            divergence = float(distance.detach())
    if not math.isfinite(divergence):
        raise ValueError("model: its batch norms see numbers that are not finite (NaN or infinite)")
    return inputs.detach(), divergence


def _classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A class for each input, and for each of its positions: `[B]` or `[B, ...]`."""
    size, number = logits.shape[:2]
    labels = _rounds(number, size, generator).to(logits.device)
    return labels.view(-1, *[1] * (logits.dim() - 2)).expand(size, *logits.shape[2:])


@contextmanager
def _seen_by(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills, in evaluation mode: for each batch norm, the divergence of
    what it sees from what it saw in training, `[]`."""
    seen: list[Tensor] = []

    def look(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        seen.append(_divergence(norm, inputs[0]))

    with hooked(model, *(norm.register_forward_pre_hook(look) for norm in norms)):
        yield seen


def _divergence(norm: _BatchNorm, x: Tensor) -> Tensor:
    """KL divergence in nats, of normal distributions, between what a channel has in `x` and what it
    had in training: the mean over channels, `[]`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    over = [i for i in range(x.dim()) if i != 1]
    var, mean = torch.var_mean(x.float(), over, correction=0)
    before = norm.running_var + norm.eps
    ratio = (var + norm.eps) / before
    shift = (mean - norm.running_mean).square() / before
    return (ratio + shift - 1 - ratio.log()).mean() / 2


def _own_divergence(model: nn.Module, norms: list[_BatchNorm], inputs: Tensor) -> float:
    with _seen_by(model, norms) as seen:
        forward_logits(model, inputs)
    return float(torch.stack(seen).mean())
