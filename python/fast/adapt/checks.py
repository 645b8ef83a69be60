"""What a network and training data must be, whatever is done with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fast.data.dataset import Data
from fast.data.finite import check_finite_inputs
from fast.data.trees import leaves


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


def check_gradients(caller: str) -> None:
    """Raise ValueError where nothing can be trained, because gradients are switched off."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise ValueError(f"{caller} was called under torch.{mode}, where nothing can be trained")


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
