"""What has become of the answers of a network's source head, in nats."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fast.heads import find_head, task_head
from fast.heads.forward import logits_of

# Over this temperature the entropy of ResNet-20's answers to its training images (0.096 nats) is
# that of its plain ones to test images (0.086). The rise of the loss of test images was 0.8 to 1.4
# times what this measures on training images, from 0.03 to 26 nats; at temperature 1, 1.1 to 3.1
# times. Of MobileNet on images that it does not know it was 0.6 to 1.2 times (at 1: 0.5 to 1.0).
DOUBT = 2.0


class Answers(nn.Module):
    """A network as a function from inputs to one tensor of source logits, over a temperature."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = logits_of(self.model(*args, **kwargs))
        return logits if self.temperature == 1 else logits / self.temperature


def divergence(before: Tensor, now: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(before || now) of logits `[N, C, ...]` over a temperature, nats, float64 `[]`."""
    p, q = ((x.double() / temperature).log_softmax(1) for x in (before, now))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    return kl.mean()


def expected_rise(before: Tensor, now: Tensor) -> Tensor:
    """Rise of the source loss on inputs that were never seen, from the answers to any, `[]`.

    `T KL(before || now)` of the source logits `[N, C, ...]` over T. At T = 1 it is the rise under
    the labels that the pretrained network itself gives, and right where it is as sure as it should
    be; of its training inputs it is much surer. Large losses are linear in the logits, and T falls
    out.
    """
    return DOUBT * divergence(before, now, DOUBT)


def backbone_parameters(model: nn.Module, sample: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters but those of the target head and the source head, by name.

    Raises:
        ValueError: there are none.
    """
    head = task_head(model)
    own = head if head is not None else find_head(model, sample).module
    skip = {id(p) for p in own.parameters()}
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in skip}
    if not found:
        raise ValueError("model has no trainable backbone parameter: there is nothing to protect")
    return found
