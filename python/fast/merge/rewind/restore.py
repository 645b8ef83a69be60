"""Bring the source's features back by a few steps, while the target is learned on."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from fast.adapt.guards.rehearse import TOLERANCE, pull, restraint
from fast.heads import forward_logits, task_head
from fast.heads.batch_norm import per_task_norms
from fast.merge.rewind.features import SourceFeatures
from fast.merge.rewind.target import Target
from fast.optim import AdamW

STEPS, TARGET_SAMPLES, SOURCE_SAMPLES = 10, 44, 16
LR, RAMP = 1.5e-3, 4
# The pull to the point that was chosen, times the learning rate: that of `fast.finetune` to w0.
ANCHOR_DECAY = 2.0


def restore(
    model: nn.Module,
    shared: Sequence[nn.Parameter],
    *,
    features: SourceFeatures,
    target: Target,
    seed: int,
) -> None:
    """Train for `STEPS` steps on the target, with the penalty of rehearsal on source inputs.

    Weights are pulled to what they are now. The source's batch norms learn, too: they are the
    source's alone. As in `fast.adapt.guards.rehearse`, the learning rate falls where the features
    are further away than they should be.
    """
    head = task_head(model)
    assert head is not None
    norms, source_norms = per_task_norms(model)
    own = [p for norm in (*norms, *source_norms) for p in norm.parameters(recurse=False)]
    trained = [*shared, *own, *head.linear.parameters()]
    for p in trained:
        p.requires_grad_(True)
    optimizer = AdamW(trained, lr=LR, anchor_decay=ANCHOR_DECAY)
    model.eval()
    for norm in norms:
        norm.training = True
    learn, keep = target.batches(TARGET_SAMPLES), features.batches(SOURCE_SAMPLES, seed)
    for step in range(STEPS):
        (x, y), rows = next(learn), next(keep)
        e = features.distance(model, rows)
        slower = restraint(float(e.detach().mean()))
        optimizer.param_groups[0]["lr"] = LR * slower * _schedule(step)
        loss = F.cross_entropy(forward_logits(model, x), y) + pull(e, "mean") / TOLERANCE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _schedule(step: int) -> float:
    return min(1.0, (step + 1) / RAMP) * (1 - step / STEPS)
