"""Teach the new head alone, on features that were computed anyway, before the first step.

This takes the place of a stall: an error that the head can correct by itself never reaches the
backbone (arXiv 2007.01388, section 3). The features are those that calibrate the feature
normaliser, so no forward pass is needed; a hundred head steps take about as long as one step of a
small network. A run that ends worse than this start goes back to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.loss import Loss
from fast.adapt.network.drift import Drift
from fast.adapt.network.rollback import copied_buffers
from fast.data.trees import pick
from fast.errors import first_line
from fast.heads import TaskHead, forward_logits
from fast.heads.forward import hooked

# Features have unit variance, so this suits every network; Adam.
LR = 1e-2
BATCH = 64
# Every fifth sample is held out and measured now and then: a head that has memorised its samples
# sends the backbone large gradients from the few it gets wrong. The held-out loss of 1456 flowers
# on MobileNet is lowest after 40 steps; that of as many signs on ResNet-20 still falls after 200.
# With 200 steps for both, the flowers end 2 points lower.
HOLD_OUT = 5
LOOK_EVERY = 20
PATIENCE = 2


def head_is_last(model: nn.Module, head: nn.Module, sample: Any) -> bool:
    """Whether the outputs of the model's head, as it is now, are the logits.

    Args:
        sample: a batch of inputs; two of them are used.

    Raises:
        ValueError: the model returns probabilities, and cross-entropy needs logits.
    """
    rows = pick(sample, slice(2))
    seen: list[Tensor] = []
    # What follows may work in place.
    hook = head.register_forward_hook(lambda *args: seen.append(args[2].clone()))
    with hooked(model, hook):
        logits = forward_logits(model, rows)
    _check_no_probabilities(model, logits, seen[-1])
    return logits.dim() == 2 and torch.equal(seen[-1], logits)


def _check_no_probabilities(model: nn.Module, logits: Tensor, outputs: Tensor) -> None:
    if logits.shape != outputs.shape or logits.dim() != 2 or torch.equal(logits, outputs):
        return
    for name, function in (("softmax", torch.softmax), ("sigmoid", _sigmoid)):
        if torch.allclose(logits.float(), function(outputs.float(), 1), atol=1e-3):
            raise ValueError(
                f"{type(model).__name__} returns probabilities (a {name} follows its head), and "
                "training needs logits: take it out of its forward. A log-softmax may stay"
            )


def _sigmoid(x: Tensor, _: int) -> Tensor:
    return x.sigmoid()


@torch.no_grad()
def check_loss(loss: Loss, head: TaskHead, features: Tensor, labels: Tensor) -> None:
    """Raise ValueError where a loss of the user's does not take these labels, or is no mean."""
    logits = head.eval()(features)
    try:
        value = loss(logits, labels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"loss fails on logits {list(logits.shape)} ({logits.dtype}) and labels "
            f"{list(labels.shape)} ({labels.dtype}), which it gets as they are in train: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return the mean over a batch, one number; got {got}")
    # A sum outweighs the penalty by the number of samples.
    if value and torch.isclose(loss(*(torch.cat([x, x]) for x in (logits, labels))), 2 * value):
        raise ValueError(
            "loss must return the mean over a batch; got a sum, which doubles with the samples "
            "(reduction='mean'; divide one of your own by len(labels))"
        )


def start_head(
    head: TaskHead,
    features: Tensor,
    labels: Tensor,
    *,
    loss: Loss,
    steps: int,
    seed: int,
) -> None:
    """Train `head.linear` on features of target inputs, until the loss on a held-out part rises.

    Args:
        features: `[N, D]`.
        labels: `[N, ...]`, as the loss takes them.
        loss: a function of logits `[B, C]` and labels that returns the mean over the samples.
        steps: the most steps to take.
        seed: seed of the order of the samples.
    """
    with torch.no_grad():
        norm = head.norm
        inputs = features if norm is None else norm.eval()(features)
        inputs = inputs.to(head.linear.weight.dtype)
    head.train()
    held = torch.arange(len(labels), device=labels.device) % HOLD_OUT == HOLD_OUT - 1
    held_out, held_labels = inputs[held], labels[held]
    inputs, labels = inputs[~held], labels[~held]
    params = list(head.linear.parameters())
    optimizer = torch.optim.Adam(params, lr=LR)
    generator = torch.Generator().manual_seed(seed)
    lowest, best, worse = math.inf, [p.detach().clone() for p in params], 0
    for step in range(1, steps + 1):
        rows = torch.randint(len(labels), (BATCH,), generator=generator).to(labels.device)
        with torch.enable_grad():
            optimizer.zero_grad()
            loss(head.linear(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        if step % LOOK_EVERY and step != steps:
            continue
        with torch.no_grad():
            # With four samples or fewer none is held out, and all steps are taken.
            now = float(loss(head.linear(held_out), held_labels)) if len(held_labels) else -step
        if now < lowest:
            lowest, best, worse = now, [p.detach().clone() for p in params], 0
        else:
            worse += 1
            if worse == PATIENCE:
                break
    with torch.no_grad():
        torch._foreach_copy_([p.detach() for p in params], best)
    optimizer.zero_grad()


class HeadStart:
    """The network before its first step: a pretrained backbone, and a head taught on its features.
    With few samples this can be better than anything that training reaches.

    Args:
        model: the network as it is before the first step.
        drift: holds the present weights of the backbone, so that only the head and the statistics
            need a copy.
    """

    def __init__(self, model: nn.Module, drift: Drift) -> None:
        self._drift = drift
        backbone = {id(p) for p in drift.params}
        self._weights = [
            (p, p.detach().clone())
            for p in model.parameters()
            if p.requires_grad and id(p) not in backbone
        ]
        self._buffers = copied_buffers(model)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights and statistics back."""
        pairs = zip(self._drift.params, self._drift.anchors, strict=True)
        for now, before in (*pairs, *self._weights):
            now.copy_(before)
        for module, name, value in self._buffers:
            module._buffers[name] = value.clone()

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {str(i): value for i, (_, value) in enumerate(self._weights)},
            "buffers": {str(i): value for i, (*_, value) in enumerate(self._buffers)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, (_, value) in enumerate(self._weights):
            value.copy_(state["weights"][str(i)])
        for i, (*_, value) in enumerate(self._buffers):
            value.copy_(state["buffers"][str(i)])
