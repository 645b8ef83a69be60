"""The fine-tuning methods as data: all of them run by the same loop and the same fused update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its choices are the methods here
    from fast.adapt.config import TrainConfig
    from fast.data.stream import TrainBatches


@dataclass(frozen=True)
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
}


DEFAULT_LR = 1e-3
DEFAULT_EPOCHS = 3
# Target inputs are those whose features have to change, so they are held less hard: 300 sign digits
# were learned to 87.2 instead of 84.0 %, 300 texts of banking77 cost 1.3 instead of 2.7 points.
OWN_SHARE = 0.3
# A few hundred photos make two or three steps an epoch, and three epochs of them end inside the
# ramp (python benchmarks/short_runs.py).
LEAST_STEPS = 100
# A run that is shorter has its rate cut by the square of its share: what the first steps do to a
# fragile network, later ones mend, and there are none. Ten steps from 20 flowers cost MobileNet 6
# points of target with a cut in proportion, and 0.7 with this.
SETTLED = 60
# Samples of a micro-batch, below which its mean and variance say too little to normalise by.
LEAST_FOR_STATISTICS = 8
# Averaged weights can take more noise, and what rehearses does not lose the source by it. Against
# 1e-3: signs and sign digits 40 % fewer steps to the same accuracy, flowers and clothes about as
# many, the source no worse (python benchmarks/retention.py --methods fast,fast:lr=1e-3).
REHEARSING_LR = 1.5e-3
# What holds the function on source inputs directly needs less of what holds it by proxy: on GTSRB a
# card's pull of 20 beside rehearsal cost 5 points of target accuracy and kept nothing more.
EASED = 0.6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A method's settings for one run, the user's options applied.

    Attributes:
        steps: optimizer steps.
        target_size, source_size: target samples of a step, and the places beside them in which
            features are rehearsed.
        rehearsed: whose features: `"source inputs"`, `"target inputs"`, or `""` for none.

    The other fields are the options of the same name (`fast.adapt.config.TrainConfig`).
    """

    method: str
    steps: int
    target_size: int
    source_size: int
    rehearsed: str
    lr: float
    max_entropy: bool
    head_lr_scale: float
    anchor_decay: float
    distill: float
    stall: int
    ramp: int
    head_steps: int
    rehearse: float
    average: int
    batch_norm: str

    def __str__(self) -> str:
        """One line of what will be done."""
        steps = f"{self.steps} steps of {self.target_size} samples"
        if self.rehearsed:
            steps += f" and {self.source_size} {self.rehearsed}, whose features are kept"
        rate = f"lr {self.lr:g}"
        if self.steps < self.stall + self.ramp:
            reached = max(0, self.steps - self.stall) / self.ramp if self.ramp else 0.0
            rate += f", of which so short a run reaches {100 * reached:.0f} %"
        first = (
            f"the head alone for up to {self.head_steps} steps, then " if self.head_steps else ""
        )
        return f"{self.method}: {first}{steps}; {rate}"


def rehearse_weight(config: TrainConfig, source_inputs: bool = True) -> float:
    """Weight of keeping the features of source inputs, or else of the target's own."""
    if config.rehearse is not None:
        return config.rehearse
    return METHODS[config.method].rehearse * (1.0 if source_inputs else OWN_SHARE)


def rehearsed_by(config: TrainConfig, source_inputs: bool) -> str:
    """Whose features a run keeps: `Plan.rehearsed`."""
    if not rehearse_weight(config):
        return ""
    return "source inputs" if source_inputs else "target inputs"


def steps_for(config: TrainConfig, batches: TrainBatches) -> int:
    """Length of the run: what was asked for, else three epochs and at least `LEAST_STEPS`."""
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        return batches.steps_for(config.epochs)
    return max(LEAST_STEPS, batches.steps_for(DEFAULT_EPOCHS))


def uses_card(config: TrainConfig, card: bool, source_inputs: bool) -> bool:
    """Whether a run has a card: it was given one, or makes its own.

    A method that rehearses by itself keeps more by that than by a card (docs/research.md); one that
    was only told to, such as `ewc`, still makes its own. `ewc` makes it of target inputs where
    there are no others.

    Args:
        card, source_inputs: there is one, there are some.
    """
    method = METHODS[config.method]
    if card:
        return True
    if method.card_decay is None or (method.rehearse and rehearse_weight(config)):
        return False
    return source_inputs or config.method == "ewc"


def plan_for(
    config: TrainConfig,
    *,
    steps: int,
    target_size: int = 0,
    source_size: int = 0,
    weighted: bool = False,
    head_is_last: bool = False,
    rehearsed: str = "",
    batch_norms: bool = False,
) -> Plan:
    """Settings of this run; what was not given is the method's own.

    Args:
        steps, target_size, source_size, rehearsed: see `Plan`.
        weighted: the pull is weighted by source curvature.
        head_is_last: the head's outputs are the logits.
        batch_norms: the network has batch norm, and micro-batches of `LEAST_FOR_STATISTICS`.
    """
    method = METHODS[config.method]
    ease = EASED if rehearsed else 1.0
    lr = (REHEARSING_LR if rehearsed else DEFAULT_LR) * (
        min(1.0, steps / SETTLED) ** 2 if method.ramp else 1.0
    )
    decay = method.card_decay if weighted and method.card_decay is not None else None

    def chosen(value: float | None, default: float) -> float:
        return default if value is None else value

    head_steps = int(chosen(config.head_steps, method.head_steps)) if head_is_last else 0
    stall = chosen(config.stall, 0 if head_steps else method.stall)
    if method.probe:
        if config.stall is not None:
            raise ValueError(f"{config.method} has no stall; it has probe_steps")
        stall = chosen(config.probe_steps, max(1, round(method.probe * steps)))
    elif config.probe_steps is not None:
        raise ValueError(f"probe_steps is for lp-ft; {config.method} has stall")
    # Statistics of the target's own let features of the target differ from the source's without any
    # weight moving. Rehearsal holds the source under its own statistics, which nothing else does.
    batch_norm = config.batch_norm or ("per_task" if rehearsed and batch_norms else "frozen")
    return Plan(
        method=config.method,
        steps=steps,
        target_size=target_size,
        source_size=source_size,
        rehearsed=rehearsed,
        lr=chosen(config.lr, lr),
        max_entropy=method.max_entropy if config.max_entropy is None else config.max_entropy,
        head_lr_scale=chosen(config.head_lr_scale, method.head_lr_scale),
        anchor_decay=chosen(
            config.anchor_decay, ease * (method.anchor_decay if decay is None else decay)
        ),
        # Per-task batch norm gives the source head features of its own: there is nothing to share.
        distill=chosen(config.distill, 0.0 if batch_norm == "per_task" else ease * method.distill),
        stall=int(stall),
        ramp=int(chosen(config.ramp, ease * method.ramp)),
        head_steps=head_steps,
        rehearse=rehearse_weight(config, rehearsed == "source inputs") if rehearsed else 0.0,
        average=int(chosen(config.average, min(method.average, steps // 4))),
        batch_norm=batch_norm,
    )
