"""What a run does where the user does not say: its length, its rate, what it keeps and how hard.

The rules read the amount of data, the norms of the network, and whether there are source inputs;
never which network or data they are. docs/defaults.md has them as a table, with measurements.
"""

from __future__ import annotations

import math

from fast.adapt.config import AdaptConfig
from fast.adapt.methods import METHODS
from fast.data.stream import TrainBatches

SOURCE_INPUTS, TARGET_INPUTS = "source inputs", "target inputs"
SHUFFLED = "target inputs (half or more with shuffled patches)"
OWN = (TARGET_INPUTS, SHUFFLED)
TOGETHER, SWITCHED = "together", "switched"

DEFAULT_EPOCHS = 3
# A few hundred photos make two or three steps an epoch, and three epochs of them end inside the
# ramp (benchmarks/finetune/short_runs.py).
LEAST_STEPS = 100
# A shorter run has its rate cut by the square of its share: what the first steps do to a fragile
# network, later ones mend, and there are none. Ten steps from 20 flowers cost MobileNet 6 points of
# target with a cut in proportion, and 0.7 with this.
SETTLED = 60
# A micro-batch of fewer samples has a mean and a variance that are too noisy to normalise by.
LEAST_FOR_STATISTICS = 8

DEFAULT_LR = 1e-3
# Averaged weights bear more noise, and a run that rehearses does not lose the source by it. Against
# 1e-3, signs and sign digits take 40 % fewer steps to the same accuracy, flowers and clothes about
# as many, and the source is no worse (benchmarks/finetune/retention.py).
REHEARSING_LR = 1.5e-3
# Networks with layer norms, transformers most of all, are fine-tuned at lower rates. MiniLM learned
# trec6 to 94.5 % at either, and lost 2.2 points of its source skill at this one, 5.0 at the other;
# a MobileNet with no norms lost no less and learned 0.8 points less at this one.
LAYER_NORM_LR = 5e-4
# Adapters start from nothing and bear more. ResNet-20 learned 242 letters to 69.2 % at 3e-3, and to
# 77.4 at this rate; MiniLM learned trec6 to 94.9 and 95.5 %, sst2 to 83.2 and 84.4. A ViT does not
# bear it, and its first step says so (`fast.adapt.guards.pace`).
ADAPTER_LR = 1e-2
# The samples of a step that bear it, see `noise_factor`.
ADAPTER_BATCH = 64
# A transformer bears less here, too: MiniLM learned trec6 to 95.5 % at this rank, and to 93.7 where
# adapters of rank 32 moved it four times as fast.
LAYER_NORM_RANK = 8
# A step of SGD with momentum is as long as its gradients, and Adam's as its rate. ResNet-20 learned
# sign digits in 100 steps to 96.1 % at 0.03, and lost 0.9 points; at 0.1 it lost 5.0.
SGD_FACTOR = 20.0
# One such step destroyed a MobileNet without norms at 0.01 already; with its gradient clipped it
# learned flowers to 84.8 % at 0.03 and lost nothing.
SGD_CLIP = 1.0

# Few samples bear less of everything that holds the function: the head learns them by heart and
# soon asks little of the backbone, which is then held for nothing. With 100 sign digits a weight of
# 1 for the target's own features learned 74, one of 0.1 learned 78 %; with 2,000 to 5,000 samples
# it cost 1 point of target and kept 1 to 5 of the source (docs/defaults.md).
PLENTY = 2000
LEAST_SHARE = 0.1
# The least weight of keeping features. From ten of each class three pairs learned 0.2 to 1.0 points
# more at this weight and without distillation than at 0.1 beside it, and lost as much (one seed).
LEAST_REHEARSE = 0.3
# With fewer samples than this the head begins to decay, and the source's answers to them are no
# longer kept; with half as many or less both are at their full. With adapters, ten pairs of 1,600
# samples or more learned 0.2 points less in the mean by it (docs/research.md).
FEW = 1000
# The most of itself that the head loses in a step by decay, at whatever rate the user gives.
MOST_DECAY = 0.1
# Source inputs get this share of a batch, and more where the same few target samples would come
# round again and again. With a half, beside a tenth of the weights that hold the function, 100 sign
# digits were learned to 88 % and 0.8 points lost; with an eighth and the whole weights, 83 and 0.2.
SOURCE_SHARE = 1 / 8
LARGEST_SOURCE_SHARE = 1 / 2
# The target's own pictures have to get other features; ones with shuffled patches need not. With
# half of each at this weight, clothes were learned to 85.4 % and 0.8 points lost, signs to 72.6 and
# 1.6; with the own ones alone at a weight of 1, to 84.4 and none lost, and to 70.6 and 1.4.
SHUFFLED_WEIGHT = 0.5
# Rehearsal holds the function on source inputs directly, and needs less of what holds it by proxy:
# on GTSRB a card's pull of 20 beside rehearsal cost 5 points of target accuracy and kept nothing.
EASED = 0.6


def share_of_plenty(samples: int | None) -> float:
    """The number of samples as a share of `PLENTY`, from `LEAST_SHARE` to 1.

    Weights that hold the function are multiplied by it.

    Args:
        samples: of the training data; None where their number is not known.
    """
    return 1.0 if samples is None else min(1.0, max(LEAST_SHARE, samples / PLENTY))


def scarcity(samples: int | None) -> float:
    """How few samples are: 0 from `FEW` on, 1 up to half of it.

    Args:
        samples: see `share_of_plenty`.
    """
    return 0.0 if samples is None else min(1.0, max(0.0, 2 - 2 * samples / FEW))


def distill_weight(samples: int | None) -> float:
    """Factor on the weight of distillation."""
    return share_of_plenty(samples) * (1 - scarcity(samples))


def source_share(samples: int | None) -> float:
    """The share of a batch that source inputs get."""
    return min(LARGEST_SOURCE_SHARE, SOURCE_SHARE / share_of_plenty(samples))


def own_beside_shuffled(count: int, samples: int | None) -> int:
    """How many pictures as they are go with `count` of shuffled patches. Few samples are learned by
    heart: 26 of 100 sign digits beside 256 of shuffled patches cost two points of target.

    Args:
        samples: of the training data.
    """
    return round(count * (1.0 if samples is None else min(1.0, samples / PLENTY) ** 2))


def own_beside_synthetic(count: int, samples: int) -> int:
    """How many of the target's own inputs go with `count` synthetic ones. They fall off less than
    beside shuffled patches, because 26 of 100 sign digits in place of one then cost 0.7 points of
    target and kept 0.8 of the source (one seed).

    Args:
        samples: of the training data.
    """
    return round(count * share_of_plenty(samples))


def rehearse_weight(
    config: AdaptConfig, rehearsed: str = SOURCE_INPUTS, samples: int | None = None
) -> float:
    """Weight of keeping features.

    Args:
        rehearsed: whose, see `Plan`.
    """
    if config.rehearse is not None:
        return config.rehearse
    weight = METHODS[config.method].rehearse
    if config.keeps_head:  # it has learned already, and its answers to the target have to change
        return weight if rehearsed == SOURCE_INPUTS else 0.0
    most = SHUFFLED_WEIGHT if rehearsed == SHUFFLED else 1.0
    return weight * min(most, max(LEAST_REHEARSE, share_of_plenty(samples)))


def noise_factor(target_size: int, samples: int | None) -> float:
    """Factor on the rate of adapters, at most 1, where a step has few samples.

    Adam's step is as long for a gradient that is noise as for one that is not. The noise of a mean
    over samples falls with the root of their number, and a batch of all samples has none. Steps of
    8 samples at the full rate ruined a ResNet-44 from 100 flowers
    (benchmarks/experiments/small_batches.py).

    Args:
        target_size: samples of a step; 0 where their number is not known.
        samples: of the training data; None where their number is not known.
    """
    left_out = 1 - target_size / samples if samples else 1.0
    if not target_size or left_out <= 0:
        return 1.0
    return min(1.0, math.sqrt(target_size / left_out / ADAPTER_BATCH))


def default_lr(
    config: AdaptConfig,
    *,
    steps: int,
    rehearsed: bool,
    layer_norms: bool,
    target_size: int,
    samples: int | None,
) -> float:
    """Peak learning rate of the backbone.

    Args:
        rehearsed: features are kept, and restrain the rate where they move too far.
        layer_norms: the network has layer norms.
        target_size, samples: see `noise_factor`.
    """
    method = METHODS[config.method]
    if config.has_adapters:
        lr = ADAPTER_LR * noise_factor(target_size, samples)
    elif rehearsed:
        lr = LAYER_NORM_LR if layer_norms else REHEARSING_LR
    else:
        lr = DEFAULT_LR
    if config.optimizer == "sgd":
        lr *= SGD_FACTOR
    return lr * min(1.0, steps / SETTLED) ** 2 if method.ramp else lr


def rehearsed_by(config: AdaptConfig, source_inputs: bool) -> str:
    """Whose features a run is to keep: `Plan.rehearsed`, where the target's inputs allow it."""
    rehearsed = SOURCE_INPUTS if source_inputs else TARGET_INPUTS
    return rehearsed if rehearse_weight(config, rehearsed) else ""


def steps_for(config: AdaptConfig, batches: TrainBatches) -> int:
    """Length of the run: what the options say, else three epochs and at least `LEAST_STEPS`."""
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        return batches.steps_for(config.epochs)
    return max(LEAST_STEPS, batches.steps_for(DEFAULT_EPOCHS))


def uses_card(config: AdaptConfig, card: bool, source_inputs: bool) -> bool:
    """Whether a run has a card, of the user's or its own.

    Rehearsal keeps more than a card does (docs/research.md), so a method that rehearses by itself
    makes none. `ewc` makes its card of target inputs where there are no source inputs.

    Args:
        card, source_inputs: whether the user gave one, or some.
    """
    method = METHODS[config.method]
    if config.has_adapters:
        return False
    if card:
        return True
    if method.card_decay is None or (method.rehearse and rehearse_weight(config)):
        return False
    return source_inputs or config.method == "ewc"


def too_few_for_norms(samples: int | None) -> bool:
    """Whether adapters learn more beside the source's batch norms than beside some of their own."""
    return samples is not None and samples < PLENTY


def default_rank(config: AdaptConfig, *, layer_norms: bool) -> int:
    """The rank of adapters; 0 where the method has none."""
    rank = METHODS[config.method].adapter_rank
    return min(rank, LAYER_NORM_RANK) if layer_norms else rank


def default_clip(config: AdaptConfig) -> float | None:
    """Largest gradient norm of a step of SGD, which nothing else bounds; None for any other."""
    return SGD_CLIP if config.optimizer == "sgd" and METHODS[config.method].ramp else None


def default_head_decay(config: AdaptConfig, samples: int | None, rate: float) -> float:
    """Weight decay of the new head, times its learning rate: the method's where samples are few,
    or `weight_decay`.

    Args:
        samples: of the training data; None where their number is not known.
        rate: the peak learning rate of the head.
    """
    if config.head_decay is not None:
        return config.head_decay
    decay = METHODS[config.method].head_decay * scarcity(samples)
    if config.optimizer == "sgd":
        decay /= SGD_FACTOR
    return max(min(decay, MOST_DECAY / rate), config.weight_decay)


def default_tasks(config: AdaptConfig, rehearsed: str) -> str:
    """The regime of a run whose `tasks` are not given, if something can be kept per task.

    Args:
        rehearsed: see `Plan`.
    """
    if config.has_adapters:
        return SWITCHED
    if config.batch_norm is not None:
        return SWITCHED if config.batch_norm == "per_task" else TOGETHER
    # With statistics of its own the target's features can differ from the source's without any
    # weight moving. Only rehearsal holds the source under the source's statistics.
    return SWITCHED if rehearsed and not config.keeps_head else TOGETHER
