"""The noise of training mode, measured by what it adds to the features: dropout, and batch norm.

The normaliser scales the features up until they vary by one between inputs, and with them what
dropout adds. A head that was taught on features without dropout then errs by nats from the first
step on, and the backbone forgets in answer to noise. So dropout that drowns what distinguishes the
inputs is switched off.

The statistics of a batch differ from those of the next one, and each batch norm hands on what the
ones before it have added. Where that is much, the target gets no statistics of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fast.adapt.network.shared_forward import HeadInput, features_by_mode
from fast.data.trees import leaves, length, pick
from fast.heads import by_batch_statistics, by_sample, traceless

# Variance that dropout adds, by the variance between inputs, from which on it is switched off. At
# 2.0 a MobileNet learned flowers to 84.6 % and lost 4.0 points, without dropout to 87.0 and lost
# none; at 3.4 and 13.7 ResNet-20 learned traffic signs to 67 and 55 %, without to 74. What adds
# less makes little difference (benchmarks/experiments/dropout.py).
DROWNED = 1.0
# Variance that the statistics of a batch add to a feature, by the variance between inputs, from
# which on the target gets no batch norms of its own: the median of the features, because each is
# scaled up by itself. With norms of its own EfficientNet-Lite0, at 0.3, learned flowers to 78 % and
# not 86; ResNets, at 0.01 to 0.03, learned more with them, in batches of 16 too, where more is
# added to theirs (benchmarks/experiments/batch_noise.py). So all are measured at one size.
NOISY = 0.1
STATISTICS_OF = 64
# A quarter of each of so many batches are the same inputs, and the rest is drawn anew.
BATCHES, SHARED = 3, STATISTICS_OF // 4
LEAST_VARIANCE = 1e-3  # of a feature that counts, by the mean of all
# A module of torch that drops has its share in `p`; what drops inside of another module, or drops
# whole paths (timm), goes by these names.
DROPS = (nn.modules.dropout._DropoutNd,)
DROPS_BY_NAME = ("StochasticDepth", "DropBlock2d")
SHARES = ("dropout", "dropout_p", "dropout_prob", "drop_prob", "drop_rate", "attention_dropout",
          "attn_dropout", "activation_dropout", "hidden_dropout")  # fmt: skip

Shares = list[tuple[nn.Module, str, float]]


def dropout_shares(model: nn.Module) -> Shares:
    """What is dropped in training mode: each module with the attribute that says the share, and its
    value."""
    shares = []
    for module in model.modules():
        drops = isinstance(module, DROPS) or type(module).__name__ in DROPS_BY_NAME
        for name in ("p", *SHARES) if drops else SHARES:
            share = vars(module).get(name)
            if isinstance(share, float) and share > 0:
                shares.append((module, name, share))
    return shares


def set_dropout(shares: Shares, factor: float) -> None:
    """Set dropout to `factor` times these shares."""
    for module, name, share in shares:
        setattr(module, name, factor * share)


def added_by_dropout(model: nn.Module, head: nn.Module, inputs: Any) -> float:
    """Variance that dropout adds to what the head sees, by the variance between inputs.

    It is measured for the source task, so that it is the same before and after a calibration, and
    leaves no trace (`features_by_mode`).

    Args:
        inputs: samples, two or more, on the model's device.
    """
    rows = [by_sample(x.double(), length(inputs)) for x in features_by_mode(model, head, inputs)]
    between, added = (float(x.var(0).mean()) for x in (rows[0], rows[1] - rows[0]))
    return added / between if between else 0.0


def added_by_batches(model: nn.Module, head: nn.Module, inputs: Any) -> float:
    """Variance that the statistics of a batch add to a feature, by that between inputs: the median
    of the features that the head sees.

    It leaves no trace.

    Args:
        inputs: samples on the model's device, from which batches of `STATISTICS_OF` are drawn.
    """
    number, device = length(inputs), leaves(inputs)[0].device
    generator = torch.Generator().manual_seed(0)
    head_input = HeadInput(head)
    rows = []
    eager = torch.compiler.set_stance("force_eager")
    try:
        with traceless(model), by_batch_statistics(model), eager:
            for _ in range(BATCHES):
                drawn = torch.randint(number, (STATISTICS_OF,), generator=generator)
                drawn[:SHARED] = torch.arange(SHARED) % number
                features = head_input.features(model, pick(inputs, drawn.to(device)))
                of_shared = features[: len(features) * SHARED // STATISTICS_OF]
                rows.append(of_shared.double().flatten(1))
    finally:
        head_input.close()
    features = torch.stack(rows)
    between, added = features.mean(0).var(0), features.var(0).mean(0)
    varies = between > LEAST_VARIANCE * between.mean()
    return float((added / between)[varies].median()) if varies.any() else 0.0
