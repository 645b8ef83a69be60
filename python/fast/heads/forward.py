"""Call a classifier on a batch of any form, and take the logits from whatever it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fast.data.trees import kind, leaves, move, pick, shapes
from fast.errors import first_line

# An evaluation takes batches of at least this many samples, however few a training step has.
LEAST_EVAL_BATCH = 128
# Networks of sounds look at some hundred samples at once: wav2vec2 at 400, which are 25 ms.
LEAST_SOUND = 400
CHANNELS = (1, 3, 4)  # of pictures


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
            model = cast(nn.Module, model._orig_mod)
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


def answers(model: nn.Module, inputs: Any, mirrored: bool = False) -> Tensor:
    """Logits `[B, C]` of the network.

    Args:
        mirrored: the mean over images `[B, C, H, W]` and their mirror images.
    """
    logits = forward_logits(model, inputs).float()
    if not mirrored:
        return logits
    return (logits + forward_logits(model, inputs.flip(3)).float()) / 2


def check_logits(logits: Tensor) -> None:
    """Raise ValueError where a network has one number for each sample, and so no classes."""
    if logits.dim() < 2:
        raise ValueError(
            f"the network answers with shape {list(logits.shape)} for {len(logits)} samples, and a "
            "classifier has logits [B, C]: let its forward return them as they are, not squeezed"
        )


def check_mirrored(inputs: Any, name: str) -> None:
    """Raise ValueError where the inputs of the data called `name` are nothing to mirror."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        raise ValueError(
            f"tta mirrors images [B, C, H, W], and {name} has {kind(inputs)}: leave tta out"
        )


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
    """Evaluation mode without gradients; see `in_mode`."""
    with in_mode(model, False), torch.no_grad():
        yield


@contextmanager
def traceless(model: nn.Module) -> Iterator[None]:
    """Buffers and torch's random states are after the block as they were before it."""
    device = next(model.parameters()).device
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for name, b in model.named_buffers():
            b.copy_(buffers[name])


@contextmanager
def hooked(model: nn.Module, *hooks: RemovableHandle) -> Iterator[None]:
    """Evaluation mode with hooks, which are removed afterwards.

    Compiled parts run uncompiled, because compiled code does not call new hooks.
    """
    has_compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    eager = torch.compiler.set_stance("force_eager") if has_compiled else nullcontext()
    try:
        with evaluating(model), eager:
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def input_errors(name: str, inputs: Any, model: nn.Module | None = None) -> Iterator[None]:
    """Turn errors of a forward pass into one that says: the network does not take these inputs.

    Args:
        name: name of the data, for the message.
        model: if it is given, the message says what the network does take.

    Raises:
        ValueError: in place of an error about the shape, type or number of inputs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        hint = "" if model is None else mismatch(model, inputs)
        raise ValueError(
            f"{name}: the network does not take these inputs ({shapes(inputs)}): "
            f"{first_line(error)}{hint}"
        ) from error


def mismatch(model: nn.Module, inputs: Any) -> str:
    """A hint at what the network takes; empty unless the inputs are plainly of another kind."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    name = getattr(model, "main_input_name", next(iter(parameters), ""))
    tensors = leaves(inputs)
    if tensors and tensors[0].dim() == 4 and name in ("input_ids", "ids", "tokens"):
        return f"; it is a text network (it takes {name}), and these look like images"
    if tensors and not tensors[0].is_floating_point() and name in ("pixel_values", "input_values"):
        return f"; it takes {name}, numbers with a fraction, and these are whole numbers"
    if tensors and name == "input_values" and tensors[0].shape[-1] < LEAST_SOUND:
        return (
            f"; the longest of these sounds has {tensors[0].shape[-1]} samples, which are too few"
        )
    if isinstance(inputs, Mapping) and (name not in inputs or not set(inputs) <= set(parameters)):
        if not takes_all:
            return f"; its forward takes ({', '.join(parameters)}): give the data these names"
        if name not in inputs:
            return f"; it takes {name}"
    return _not_ready(model, tensors[0]) if tensors else ""


def _not_ready(model: nn.Module, x: Tensor) -> str:
    """A hint at what still has to be done with pictures, or with numbers of another type."""
    hints = []
    sees = any(isinstance(m, nn.Conv2d) for m in model.modules())
    if sees and x.dim() == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS:
        hints.append("these look like pictures [N, H, W, C]: give x.permute(0, 3, 1, 2)")
    if sees and x.dim() == 3:
        hints.append("pictures are [N, C, H, W]: give x[None] of one, x[:, None] of grey ones")
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    if sees and not x.is_floating_point():
        hints.append("give pixels as in training, mostly (x / 255 - mean) / std")
    elif x.is_floating_point() and x.dtype != weights:
        hints.append(f"its weights are {weights}: give x.to({weights})")
    return "".join(f"; {hint}" for hint in hints)


def check_takes(model: nn.Module, inputs: Any, name: str) -> None:
    """Try a forward pass with two samples of a batch, which may be on any device.

    Raises:
        ValueError: the network does not take them.
    """
    device = next(model.parameters(), torch.empty(0)).device
    with input_errors(name, inputs, model), evaluating(model):
        forward_logits(model, move(pick(inputs, slice(2)), device))
