"""Tell where dropout drowns what distinguishes the inputs of a network.

Features that are nearly alike for all inputs are those of a network with random weights, say, whose
[CLS] token is the same in every text. The normaliser scales their differences up, and dropout with
them: the first losses are then a hundred nats, and the backbone forgets what the head has learned.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.network.shared_forward import HeadInput
from fast.data.trees import length, move
from fast.heads import by_sample, in_mode, traceless

log = logging.getLogger("fast")

# Variance that dropout adds, by the variance between inputs, from which on training fails. Dropout
# of a half before the head adds the mean square by the variance: 1.1 in MiniLM, 2.0 in MobileNet,
# 6.6 in ResNet-20. A BERT with random weights and dropout of 0.1 has 37,000: its head reaches 98 %
# by itself, and falls to chance in fifteen steps. Without dropout sixty steps reach 100 %.
DROWNED = 100.0


def warn_of_dropout(model: nn.Module, head: nn.Module, inputs: Any, features: Tensor) -> None:
    """Warn where dropout changes features much more than one input differs from another.

    Random state, modes and buffers stay as they are.

    Args:
        inputs: a batch of samples.
        features: what the head sees of them in evaluation mode.
    """
    if length(inputs) < 2 or not _has_dropout(model):
        return
    head_input = HeadInput(head)
    inputs = move(inputs, next(model.parameters()).device)
    try:
        with (
            torch.no_grad(),
            traceless(model),
            in_mode(model, True),
            torch.compiler.set_stance("force_eager"),
        ):
            trained = head_input.features(model, inputs)
    finally:
        head_input.close()
    rows = [by_sample(x.double(), length(inputs)) for x in (features, trained - features)]
    between, added = (float(x.var(0).mean()) for x in rows)
    if added > DROWNED * between:
        log.warning(
            "dropout changes what the head sees more than one training input differs from another "
            "(%.0f times the variance), and drowns this in training: are the weights pretrained? "
            "If they are, set the network's dropout to 0",
            added / between,
        )


def _has_dropout(model: nn.Module) -> bool:
    """Whether a module drops values (`p`) or paths (timm's `drop_prob`) in training mode."""
    shares = (getattr(m, name, 0) for m in model.modules() for name in ("p", "drop_prob"))
    return any(isinstance(share, float) and share > 0 for share in shares)
