"""The methods as data: one loop and one fused update run all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal["fast", "vanilla", "lp-ft", "l2-sp", "ewc", "replay", "adapter"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method sets where the user does not.

    Attributes:
        max_entropy: start with a zero head on normalised features, else with a random head on raw
            features.
        head_lr_scale: learning rate of the head, as a multiple of the backbone's.
        anchor_decay: pull towards the pretrained weights.
        card_decay: the pull if source curvature (of mean 1) weights it: with a card, or with source
            inputs that are not rehearsed. None: the method's pull is never weighted.
        distill: weight of keeping the source head's answers to target inputs. With rehearsal, this,
            the pull and the ramp are multiplied by `EASED`.
        stall: optimizer steps for which the backbone is not touched at all.
        ramp: steps over which the backbone's learning rate then rises. It is counted in steps and
            not as a share of the run, because it waits for Adam's own averages. A run that is
            shorter than the ramp ends on the way up.
        probe: share of the run that trains the head alone; it sets `stall`.
        head_steps: steps of the head alone on features computed beforehand, if the head's outputs
            are the logits; `stall` is then needless, and 0.
        rehearse: weight of keeping the features of source inputs. Without source inputs, the
            target's own are rehearsed, under the source's statistics, and pictures of shuffled
            patches with them.
        average: steps over which the weights are averaged.
        head_decay: weight decay of the new head, times its learning rate, where samples are few.
            Where there is any, the statistics that its features are normalised by stay those of
            the pretrained network.
        replay: each step also trains on a batch of source inputs, at twice the cost.
        adapter_rank: rank of low-rank adapters, which learn in place of the weights, in a network
            without layer norms; 0 for none.
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
    head_decay: float = 0.0
    replay: bool = False
    adapter_rank: int = 0


# Measured on ResNet-20/32, MobileNet and MiniLM: benchmarks/results/, docs/defaults.md.
METHODS: dict[str, Method] = {
    # Adam's first step is sign(g) in every weight at once. At lr 1e-3 it changed the normalised
    # features by 1.1 to 2.3 times their norm on six pairs, and raised the loss on all but one, by
    # up to 20 nats (benchmarks/experiments/first_step.py): hence the ramp.
    # distill and anchor_decay trade target for source along one curve. distill needs a source head
    # that means something on target inputs; the pull works without one.
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
        head_decay=1.0,
    ),
    "vanilla": Method(),
    # Kumar et al. 2022 (arXiv 2202.10054): a linear probe first, then everything.
    "lp-ft": Method(head_lr_scale=10.0, probe=1 / 6),
    # Li et al. 2018 (arXiv 1802.01483), decoupled from the gradient.
    "l2-sp": Method(anchor_decay=10.0),
    # Kirkpatrick et al. 2017 (arXiv 1612.00796), decoupled from the gradient.
    "ewc": Method(card_decay=100.0),
    # fast.adapt.guards.replay is all that holds the source.
    "replay": Method(replay=True),
    # fast.heads.adapters. All that learns belongs to the target, so nothing has to be held: this
    # has the head, head start, ramp and average of `fast`, and none of its guards. Adapters of a
    # higher rank are faster, which decides where samples are few: from ten of each class ResNet-20
    # learned signs to 59 % at rank 8 and to 68 at 32. A higher learning rate ruined such runs
    # (`benchmarks/finetune/adapters.py`).
    # The head learns at the adapters' own rate. At ten times that it learned few samples by heart
    # before the adapters had moved: from ten samples of each class, ResNet-20 then learned sign
    # digits to 82 % and not 89 %, and MobileNet flowers to 68 % and not 75 %. For the same reason
    # the head decays where samples are few: what it cannot say louder, the adapters have to say
    # (`benchmarks/experiments/head_decay.py`).
    "adapter": Method(
        max_entropy=True,
        stall=5,
        ramp=30,
        head_steps=200,
        average=10,
        head_decay=4.0,
        adapter_rank=32,
    ),
}


def default_method(tasks: str | None) -> MethodName:
    """The method where the user names none.

    Where the tasks are switched in any case, adapters learned more than `fast` with norms per task,
    forgot nothing, and cost no more (benchmarks/results/regimes.md).
    """
    return "adapter" if tasks == "switched" else "fast"
