"""What is not finite, or no number yet: said before it spoils the weights, or what was saved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fast.data.dataset import Data
from fast.data.finite import check_finite_inputs
from fast.data.trees import leaves
from fast.train.resume.checkpoint import PREFIX, list_checkpoints

# Times the loss of guessing.
ABSURD = 1e3


def check_model(model: nn.Module) -> None:
    """Raise ValueError where a network cannot be trained, whatever the data are."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if not tensors:
        raise ValueError(f"model {type(model).__name__} has no parameters, and so no linear head")
    tensors |= {n: b for n, b in model.named_buffers() if "running_" in n}
    for name, x in tensors.items():
        if x.is_meta:
            raise ValueError(f"model: {name} is on the meta device; load its weights first")
        if x.is_inference():
            raise ValueError(
                f"model: {name} was made under torch.inference_mode, so it cannot be trained: make "
                "the model outside of it"
            )
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError(
                f"model: {int((~x.isfinite()).sum())} of {x.numel()} values of {name} are not "
                "finite (NaN or infinite): the weights are damaged, load others"
            )


def check_data(data: Data) -> None:
    """Raise ValueError where training data in memory cannot be trained on."""
    if data.num_samples == 1:
        raise ValueError(f"{data.name}: 1 sample; give at least 2, of two classes")
    for x in leaves(data.inputs):
        if x.is_meta or x.layout != torch.strided:
            form = "on the meta device" if x.is_meta else f"of layout {x.layout}"
            raise ValueError(f"{data.name}: inputs {form}; give dense tensors, x.to_dense()")
        if x.is_inference():
            raise ValueError(
                f"{data.name}: inputs were made under torch.inference_mode; give x.clone()"
            )
    check_finite_inputs(data.inputs, data.name)


def check_finite(
    step: int, losses: list[Tensor], weights: Iterable[Tensor], lr: float, folder: Path | None
) -> float | None:
    """The mean of the losses of the last steps; None without any.

    Args:
        step: steps done.
        losses: of the last of them.
        weights: that are trained. A loss is of the weights before its step, which may have made
            NaN of them.
        folder: of the run's checkpoints, for the message; or None.

    Raises:
        FloatingPointError: a loss or a weight is NaN or infinite.
    """
    loss = float(torch.stack(losses).mean()) if losses else None
    if loss is not None and not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} in steps {step - len(losses) + 1}..{step}: look for "
            f"non-finite inputs, lower lr ({lr:g}) or set max_grad_norm" + _kept(folder)
        )
    if not all(bool(w.isfinite().all()) for w in weights):
        raise FloatingPointError(
            f"weights are not finite (NaN or infinite) after step {step}: lower lr ({lr:g}) or set "
            "max_grad_norm" + _kept(folder)
        )
    return loss


class Diverged(UserWarning):
    """The loss at the end is finite and absurd."""


def diverged(loss: float | None, num_classes: int) -> str | None:
    """What is to be said of a loss that is finite and absurd; None of any other.

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
    """Warn, on behalf of the caller of `finetune`."""
    message = diverged(loss, num_classes)
    if message:
        warnings.warn(message, Diverged, stacklevel=4)


def _kept(folder: Path | None) -> str:
    found = [] if folder is None else list_checkpoints(folder)
    if not found:
        return ""
    step = int(found[-1].name.removeprefix(PREFIX))
    return f". The checkpoint of step {step} in {folder} is left as it is"
