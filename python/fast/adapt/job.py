"""What a run is, settled before the network is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fast.adapt.config import TrainConfig
from fast.adapt.loss import Loss
from fast.adapt.methods import Plan
from fast.data.source_inputs import SourceInputs
from fast.data.stream import TrainBatches


@dataclass(frozen=True)
class Job:
    """Handed from the trainer to what prepares the network and to what protects the source.

    Attributes:
        config: the options as they were given.
        plan: the method's settings, these options applied.
        model: at the pretrained weights, on its device.
        num_classes: of the target.
        batches: of target samples; `batch_size` of these and of rehearsed ones is a step's.
        steps: of the run.
        loss: of the target.
        sample: a batch of target inputs, on the model's device.
        rehearsed: source inputs to rehearse, or None.
        transforms: training batches go through a function of the user's.
    """

    config: TrainConfig
    plan: Plan
    model: nn.Module
    num_classes: int
    batches: TrainBatches
    batch_size: int
    steps: int
    loss: Loss
    sample: Any
    rehearsed: SourceInputs | None
    transforms: bool
