"""Detect that a run diverged: losses and weights that are not finite, or losses that are absurd."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from fast import dtensor
from fast.adapt.adaptation import Adaptation
from fast.errors import warn
from fast.models.saved.files import list_checkpoints, step_of

# A loss is absurd above this multiple of the loss of guessing.
ABSURD = 1e3


def check_finite(adaptation: Adaptation, losses: list[Tensor], folder: Path | None) -> float | None:
    """The mean of the losses of the last steps; None without any.

    Args:
        adaptation: its weights are checked too, because a loss belongs to the weights before its
            step, and the step may have turned them into NaN.
        losses: losses of the last steps.
        folder: where the run's checkpoints are, for the message; or None.

    Raises:
        FloatingPointError: a loss or a weight is NaN or infinite.
    """
    step, lr = adaptation.done, adaptation.plan.lr
    loss = float(torch.stack(losses).mean()) if losses else None
    if loss is not None and not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} in steps {step - len(losses) + 1}..{step}: look for "
            f"non-finite inputs, lower lr ({lr:g}) or set max_grad_norm" + _kept(folder)
        )
    broken = not all(bool(dtensor.local(w).isfinite().all()) for w in adaptation.params)
    if adaptation.ranks.largest(broken):
        raise FloatingPointError(
            f"weights are not finite (NaN or infinite) after step {step}: lower lr ({lr:g}) or set "
            "max_grad_norm" + _kept(folder)
        )
    return loss


class Diverged(UserWarning):
    """The final loss is finite, but absurd."""


def diverged(loss: float | None, num_classes: int) -> str | None:
    """The message about a finite but absurd loss; None for any other loss.

    Args:
        loss: the mean over the last steps.
    """
    guessing = math.log(max(num_classes, 2))
    if loss is None or loss <= ABSURD * guessing:
        return None
    return (
        f"the loss at the end is {loss:.3g}, more than {ABSURD:g} times that of guessing "
        f"({guessing:.2g}): the run diverged. Lower lr, set max_grad_norm, or look at the scale of "
        "the inputs"
    )


def warn_diverged(loss: float | None, num_classes: int) -> None:
    """Warn where the final loss is absurd."""
    message = diverged(loss, num_classes)
    if message:
        warn(message, Diverged)


def _kept(folder: Path | None) -> str:
    checkpoints = [] if folder is None else list_checkpoints(folder)
    if not checkpoints:
        return ""
    step = step_of(checkpoints[-1])
    return f". The checkpoint of step {step} in {folder} is left as it is"
