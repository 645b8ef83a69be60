"""`fast.rewind` finds the best network between two checkpoints that keeps a forgetting budget."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fast.adapt.config import Budget
from fast.adapt.guards.forgetting import hold_back
from fast.data.generators import seeded
from fast.data.source_inputs import parse_source_inputs
from fast.heads import find_head
from fast.heads.forward import check_takes
from fast.models.device import in_float32, pick_device
from fast.train.rewind.checkpoints import (
    Checkpoint,
    base_network,
    check_finite,
    classes_of_checkpoint,
    tuned_state,
)
from fast.train.rewind.result import RewindConfig, Rewound
from fast.train.rewind.search import Search

log = logging.getLogger("fast")


def rewind(
    base: Checkpoint,
    tuned: Checkpoint,
    source_inputs: Any,
    budget: float | str,
    *,
    data: Any = None,
    model: nn.Module | None = None,
    head: str | None = None,
    source_skill: str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Rewound:
    """Find the best network between two checkpoints that keeps a forgetting budget.

    It is the place on the line `w0 + t (w1 - w0)` of WiSE-FT (Wortsman et al. 2022, arXiv
    2109.01903) at which the budget is spent. What each task has for itself is fitted to that place:
    the statistics of its batch norms follow the weights, the source's head is fitted again to its
    features (without labels), and the target's head is taught again where more than two points of
    target accuracy are lost. The arguments stay as they are.

    Without `data` the target's head stays as it is, and nobody can know how much of the target is
    lost; `Rewound.unknown` says so.

    Args:
        base: the checkpoint before fine-tuning: a network, a state dict, or a file or folder that
            holds one. The names of weights may have the prefixes of wrappers; LoRA by PEFT is
            merged.
        tuned: the checkpoint after fine-tuning, of the same architecture. Its head may differ.
        source_inputs: a few hundred inputs of the source task, with labels or without. What is
            lost is measured on half of them, up to 512, which serve for nothing else.
        budget: what may be lost: nats of source loss (0.1) or points of source accuracy ("2%").
        data: samples of the target task, in any form that `fast.finetune` takes for `train`.
        model: the architecture with base's head, where `base` is no network.
        head: the name of the layer that makes the logits, where it cannot be found by running
            the network.
        source_skill: "answers", "features" or "auto": see `fast.finetune`.
        seed: the seed that decides which target samples are used.
        device: see `fast.finetune`.

    Returns:
        a `fast.Result` whose `history` is the way there, with `lost`, `unknown`, `plot()` and
        `save(folder)`.

    Raises:
        ValueError, TypeError, FileNotFoundError: an argument does not fit; the message names it.
    """
    limit = Budget.parse(budget, "budget")
    limit.warn_of_nats("budget")
    config = RewindConfig(
        forget_budget=budget, seed=seed, source_skill=source_skill, batch_norm="per_task", head=head
    )
    if source_inputs is None:
        raise ValueError(
            "source_inputs must be given: a few hundred inputs of the task of base, with labels or "
            "without, on which what is lost is measured"
        )
    samples = parse_source_inputs(source_inputs)
    place = pick_device(device)
    network = base_network(base, model).to(place).eval()
    with seeded(seed), in_float32(network):
        samples = samples.to(place)
        first = samples.part(0, 64).inputs
        check_takes(network, first, "source_inputs")
        layer = find_head(network, first, head)
        state, note = tuned_state(tuned, network, layer)
        if note:
            log.info(note)
        check_finite(network.state_dict(), "base")
        work, meter = hold_back(network, samples, budget=limit, skill=source_skill)
        search = Search(
            config, network, layer, state, sample=first, work=work, meter=meter, data=data
        )
        result = search.run()
        result.classes = classes_of_checkpoint(tuned)
        return result
