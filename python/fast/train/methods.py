"""The fine-tuning methods as data: all of them run by the same loop and the same fused update."""

from __future__ import annotations

from dataclasses import dataclass

from fast.train.config import TrainConfig


@dataclass(frozen=True)
class Method:
    """What a method sets where the user does not.

    Attributes:
        max_entropy: zero head on normalised features, else a random head on raw ones.
        head_lr_scale: learning rate of the head, as a multiple of the backbone's.
        anchor_decay: pull towards the pretrained weights.
        card_decay: the pull where it is weighted by source curvature (of mean 1) instead, given a
            card or source inputs; None: the method does not use them.
        distill: weight of staying with the source head's answers on target inputs.
        stall: optimizer steps for which the backbone is not touched at all.
        ramp: steps over which the backbone's learning rate then rises, at most `MAX_RAMP` of a
            run. Steps, not a share: what it waits for is Adam's own transient.
        probe: share of the run that trains the head alone (then `stall` is that).
        replay: each step also trains on a batch of source inputs, at twice the cost.
    """

    max_entropy: bool = False
    head_lr_scale: float = 1.0
    anchor_decay: float = 0.0
    card_decay: float | None = None
    distill: float = 0.0
    stall: int = 0
    ramp: int = 0
    probe: float = 0.0
    replay: bool = False


# Measured on ResNet-20/32, MobileNet and MiniLM: benchmarks/results/, docs/defaults.md.
METHODS: dict[str, Method] = {
    # Adam's first step is sign(g) in every weight at once. At lr 1e-3 it changed the normalised
    # features by 1.1 to 2.3 times their norm on six pairs, and raised the loss on all but one, by
    # up to 20 nats (benchmarks/first_step.py): hence the ramp.
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
    ),
    "vanilla": Method(),
    # Kumar et al. 2022 (arXiv 2202.10054): a linear probe first, then everything.
    "lp-ft": Method(head_lr_scale=10.0, probe=1 / 6),
    # Li et al. 2018 (arXiv 1802.01483), decoupled from the gradient.
    "l2-sp": Method(anchor_decay=10.0),
    # Kirkpatrick et al. 2017 (arXiv 1612.00796), decoupled from the gradient.
    "ewc": Method(card_decay=100.0),
    # fast.train.replay. Nothing else holds the weights.
    "replay": Method(replay=True),
}


MAX_RAMP = 0.3


@dataclass(frozen=True)
class Plan:
    """A method's settings for one run, the user's options applied."""

    max_entropy: bool
    head_lr_scale: float
    anchor_decay: float
    distill: float
    stall: int
    ramp: int


def plan_for(config: TrainConfig, steps: int, with_card: bool = False) -> Plan:
    """Settings of this run; steps that were not given follow the length of the run.

    Args:
        with_card: the pull is weighted by source curvature.
    """
    method = METHODS[config.method]
    decay = method.card_decay if with_card and method.card_decay is not None else None

    def chosen(value: float | None, default: float) -> float:
        return default if value is None else value

    stall = chosen(config.stall, min(method.stall, steps // 4))
    if method.probe:
        if config.stall is not None:
            raise ValueError(f"{config.method} has no stall; it has probe_steps")
        stall = chosen(config.probe_steps, max(1, round(method.probe * steps)))
    elif config.probe_steps is not None:
        raise ValueError(f"probe_steps is for lp-ft; {config.method} has stall")
    return Plan(
        method.max_entropy,
        chosen(config.head_lr_scale, method.head_lr_scale),
        chosen(config.anchor_decay, method.anchor_decay if decay is None else decay),
        # Per-task batch norm gives the source head features of its own: there is nothing to share.
        chosen(config.distill, 0.0 if config.batch_norm == "per_task" else method.distill),
        int(stall),
        int(chosen(config.ramp, min(method.ramp, MAX_RAMP * steps))),
    )
