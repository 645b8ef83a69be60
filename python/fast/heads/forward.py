"""Call a classifier on whatever its batches look like, and take the logits from what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)` for a mapping, `model(*inputs)` for a tuple, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def unwrap(model: nn.Module) -> nn.Module:
    """The module under torch.compile, DataParallel and DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "model is a TorchScript module, whose parameters cannot be replaced: pass the "
                "Python module that it was made of, or nn.Sequential(model)"
            )
        else:
            return model


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, `.logits`, `["logits"]` or the first of a tuple.

    Raises:
        TypeError: the output holds no tensor of logits.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"model returned {type(output).__name__}, which holds no logits: return a tensor, a tuple "
        "that starts with one, or an object with `logits`"
    )


def forward_logits(model: nn.Module, inputs: Any) -> Tensor:
    """Logits `[B, C]` of a batch of inputs: a tensor, or a tuple or mapping of tensors."""
    return logits_of(call(model, inputs))


def pick(inputs: Any, index: Any) -> Any:
    """The rows `index` of a tensor, or of every tensor in a tuple or mapping."""
    if isinstance(inputs, Mapping):
        nested = {k: pick(v, index) for k, v in inputs.items() if isinstance(v, Mapping)}
        return {k: nested[k] if k in nested else v[index] for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(v[index] for v in inputs)
    return inputs[index]


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode; every module gets its own mode back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back afterwards."""
    with in_mode(model, False), torch.no_grad():
        yield
