"""The methods as data: the same loop and the same fused update run all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal["fast", "vanilla", "lp-ft", "l2-sp", "ewc", "replay", "adapter"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method sets where the user does not.

    Attributes:
        max_entropy: zero head on normalised features, else a random head on raw ones.
        head_lr_scale: learning rate of the head, as a multiple of the backbone's.
        anchor_decay: pull towards the pretrained weights.
        card_decay: the pull where it is weighted by source curvature (of mean 1) instead, given a
            card, or source inputs that are not rehearsed; None: the method does not use them.
        distill: weight of staying with the source head's answers on target inputs. Where source
            inputs are rehearsed, this, the pull and the ramp are taken times `EASED`.
        stall: optimizer steps for which the backbone is not touched at all.
        ramp: steps over which the backbone's learning rate then rises. Steps, not a share of the
            run: what it waits for is Adam's own transient. A run that is shorter ends on the way
            up, at a rate that it cannot exceed.
        probe: share of the run that trains the head alone (then `stall` is that).
        head_steps: steps of the head alone on features computed beforehand, where the head's
            outputs are the logits; `stall` is then needless, and 0.
        rehearse: weight of keeping the features of source inputs; of the target's own inputs,
            under the source's statistics, where no source inputs are given.
        average: steps over which the weights are averaged.
        replay: each step also trains on a batch of source inputs, at twice the cost.
        adapter_rank: of low-rank adapters, which learn in place of the weights; 0: none.
    """

    max_entropy: bool = False
    head_lr_scale: float = 1.0
    anchor_decay: float = 0.0
    card_decay: float | None = None
    distill: float = 0.0
    stall: int = 0
    ramp: int = 0
    probe: float = 0.0
    head_steps: int = 0
    rehearse: float = 0.0
    average: int = 0
    replay: bool = False
    adapter_rank: int = 0


# Measured on ResNet-20/32, MobileNet and MiniLM: benchmarks/results/, docs/defaults.md.
METHODS: dict[str, Method] = {
    # Adam's first step is sign(g) in every weight at once. At lr 1e-3 it changed the normalised
    # features by 1.1 to 2.3 times their norm on six pairs, and raised the loss on all but one, by
    # up to 20 nats (benchmarks/experiments/first_step.py): hence the ramp.
    # distill and anchor_decay trade target for source along one curve; distill does it without
    # source data where the source head means something, the pull wherever it does not.
    "fast": Method(
        max_entropy=True,
        head_lr_scale=10.0,
        anchor_decay=2.0,
        card_decay=100.0,
        distill=0.05,
        stall=5,
        ramp=30,
        head_steps=200,
        rehearse=1.0,
        average=10,
    ),
    "vanilla": Method(),
    # Kumar et al. 2022 (arXiv 2202.10054): a linear probe first, then everything.
    "lp-ft": Method(head_lr_scale=10.0, probe=1 / 6),
    # Li et al. 2018 (arXiv 1802.01483), decoupled from the gradient.
    "l2-sp": Method(anchor_decay=10.0),
    # Kirkpatrick et al. 2017 (arXiv 1612.00796), decoupled from the gradient.
    "ewc": Method(card_decay=100.0),
    # fast.adapt.guards.replay. Nothing else holds the weights.
    "replay": Method(replay=True),
    # fast.heads.adapters. What learns is the target's alone, so nothing has to be held: it has the
    # head, head start, ramp and average of `fast`, and none of its guards. The rank is the first
    # that was tried; `benchmarks/finetune/adapters.py` compares others.
    # Their rate is that of a head already. A head of ten times that learns few samples by heart
    # before the adapters have moved: from ten sign digits of each class ResNet-20 learned 82 %, and
    # 89 % so; from ten flowers of each MobileNet 68 %, and 76 %.
    "adapter": Method(
        max_entropy=True,
        stall=5,
        ramp=30,
        head_steps=200,
        average=10,
        adapter_rank=8,
    ),
}
