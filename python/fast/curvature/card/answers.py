"""What has become of the answers of a network's source head, in nats."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fast.heads import find_head, task_head
from fast.heads.forward import logits_of

# At this temperature ResNet-20's answers to its training images have the entropy (0.096 nats) that
# its answers to test images have at temperature 1 (0.086). The loss of test images rose by 0.8 to
# 1.4 times what `expected_rise` measures on training images, from 0.03 to 26 nats; at temperature 1
# by 1.1 to 3.1 times. For MobileNet on images of other classes it was 0.6 to 1.2 times (at
# temperature 1: 0.5 to 1.0).
DOUBT = 2.0


class Answers(nn.Module):
    """A network that gives one tensor of logits, divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = logits_of(self.model(*args, **kwargs))
        return logits if self.temperature == 1 else logits / self.temperature


def divergence(before: Tensor, now: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(p || q) in nats, float64 `[]`, with p and q the softmax of logits `[N, C, ...]` over
    a temperature."""
    p, q = ((x.double() / temperature).log_softmax(1) for x in (before, now))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    return kl.mean()


def expected_rise(before: Tensor, now: Tensor) -> Tensor:
    """Estimate of the rise of the source loss on unseen inputs, from logits of any inputs, `[]`.

    It is `T KL(p || q)`, with p and q the softmax of the source logits `[N, C, ...]` over T, before
    and now. At T = 1 that is the rise under labels drawn from the pretrained network itself, which
    is right where the network is calibrated; on its training inputs it is overconfident. Large
    losses are linear in the logits, so that T cancels.
    """
    return DOUBT * divergence(before, now, DOUBT)


def backbone_parameters(model: nn.Module, sample: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters except those of the target head and the source head, by name.

    Raises:
        ValueError: there are none.
    """
    head = task_head(model)
    layer = head if head is not None else find_head(model, sample).module
    skip = {id(p) for p in layer.parameters()}
    backbone = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in skip}
    if not backbone:
        raise ValueError("model has no trainable backbone parameter: there is nothing to protect")
    return backbone
