"""Refuse networks that cannot be trained, and calls in which nothing can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from fast.errors import counted
from fast.merge.joined import Joined


def check_arguments(model: Any, loss: Any, *, keeps_head: bool) -> None:
    """Raise TypeError or ValueError for what `fast.Adaptation` cannot begin with."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_gradients("Adaptation")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of logits and labels; got {loss!r}")
    if isinstance(model, DistributedDataParallel) and not keeps_head:
        raise ValueError(
            "model is in DistributedDataParallel already, which would not know the new head: "
            "wrap it after fast.Adaptation, and pass it to forward(..., model=)"
        )


def check_gradients(caller: str) -> None:
    """Raise ValueError where nothing can be trained, because gradients are switched off."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise ValueError(f"{caller} was called under torch.{mode}, where nothing can be trained")


def check_model(model: nn.Module) -> None:
    """Raise ValueError where a network cannot be trained, whatever the data are."""
    if isinstance(model, Joined):
        one = "give joined.network, which is a plain one"
        two = "only one that takes one pass learns another task: adapt with tasks='together' first"
        raise ValueError(
            f"model: a joined network of {counted(model.passes, 'forward pass', 'forward passes')} "
            f"(docs/join.md): {one if model.passes == 1 else two}"
        )
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if not tensors:
        raise ValueError(f"model {type(model).__name__} has no parameters, and so no linear head")
    tensors |= {n: b for n, b in model.named_buffers() if "running_" in n}
    for name, x in tensors.items():
        if hasattr(x, "device_mesh"):
            raise ValueError(
                f"model: {name} is sharded already (FSDP2, DTensor): give the whole network to "
                "every process, and set shard=True, which shards it once its head is taught"
            )
        if is_lazy(x):
            raise ValueError(
                f"model: {name} is lazy, and has no weights yet: run the model once on a batch of "
                "inputs, and load its pretrained weights"
            )
        if x.is_meta:
            raise ValueError(f"model: {name} is on the meta device; load its weights first")
        if x.is_inference():
            raise ValueError(
                f"model: {name} was made under torch.inference_mode, so it cannot be trained: make "
                "the model outside of it"
            )
        if x.is_complex() and x.requires_grad:
            raise ValueError(
                f"model: {name} is {x.dtype}, and only real weights can be trained: freeze it "
                "(requires_grad_(False)), or let the network hold torch.view_as_real of it"
            )
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError(
                f"model: {int((~x.isfinite()).sum())} of {x.numel()} values of {name} are not "
                "finite (NaN or infinite): the weights are damaged, load others"
            )
