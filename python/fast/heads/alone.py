"""Check that one layer alone makes a classifier's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fast.data.trees import pick
from fast.errors import some, warn
from fast.heads.find import Head, classes_of, is_head_layer
from fast.heads.forward import call, check_logits, hooked, logits_of


@torch.enable_grad()
def check_alone(model: nn.Module, head: Head, sample: Any, *, named: bool, learns: bool) -> None:
    """Check that replacing `head` replaces the classifier.

    The network runs on two samples with the outputs of the layer set to zero. The logits of a
    sample are then all equal, unless something beside the layer contributes to them: a second head,
    a residual, a learned prior. An adapter that starts at zero contributes nothing yet, but its
    gradient is not zero. The network is left as it was.

    Args:
        head: what `find_head` returned.
        sample: a batch of inputs.
        named: whether the user named the layer.
        learns: whether the new layer will start at zero, and has to learn from there.

    Raises:
        ValueError: the network has several heads, or none, or one that cannot learn from zero; the
            message names the layers.
    """
    zeros: list[Tensor] = []

    def silence(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return zeros[-1].clone()  # the next module may work in place

    hook = head.module.register_forward_hook(silence)
    with hooked(model, hook), torch.enable_grad():  # `hooked` has switched gradients off
        output = call(model, pick(sample, slice(2)))
    logits = logits_of(output)
    check_logits(logits)
    if not named:
        _check_one_answer(model, output, logits, head)
    in_head = {id(p) for p in head.module.parameters()}
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in in_head}
    reacts = [False] * (len(zeros) + len(others))
    rows = logits.float().flatten(1)
    if logits.requires_grad:
        # The weights differ, because the plain sum of log-softmax outputs has no gradient.
        weights = torch.arange(1.0, rows.shape[1] + 1, device=rows.device)
        inputs = [*zeros, *others.values()]
        grads = torch.autograd.grad((rows * weights).sum(), inputs, allow_unused=True)
        reacts = [g is not None and bool(g.any()) for g in grads]
    beside = [name for name, r in zip(others, reacts[len(zeros) :], strict=True) if r]
    rows = rows.detach()
    spread = rows.amax(1) - rows.amin(1)
    equal = bool((spread <= 1e-5 * (1 + rows.abs().amax(1))).all())
    if beside or not equal:
        raise ValueError(_not_alone(model, head, list(logits.shape), beside))
    if learns and not any(reacts[: len(zeros)]):
        raise ValueError(
            f"the logits do not react to a zero head at {head.name}: a ReLU or a stop-gradient "
            "follows it. Remove that, or pass max_entropy=False, which starts it at random"
        )


def check_declared(model: nn.Module, head: Head) -> None:
    """Check, without a sample, that timm's `get_classifier` does not name a second head.

    Raises:
        ValueError: the network is a distilled one, whose logits are the mean of two heads.
    """
    get_classifier = getattr(model, "get_classifier", None)
    heads = get_classifier() if get_classifier is not None else None
    if isinstance(heads, (tuple, list)) and len(heads) > 1 and any(h is head.module for h in heads):
        names = [name for name, m in model.named_modules() if any(h is m for h in heads)]
        raise ValueError(
            f"{type(model).__name__} has two heads, {', '.join(names)}, which make the logits "
            "together: let its forward return what one of them makes"
        )


def _check_one_answer(model: nn.Module, output: Any, logits: Tensor, head: Head) -> None:
    """Refuse two answers of one shape; warn of others that a second head may make."""
    if not isinstance(output, (tuple, list)):
        return
    alike = [x for x in output if isinstance(x, Tensor) and x.shape == logits.shape]
    if len(alike) > 1:
        raise ValueError(
            f"the network returns {len(alike)} answers of shape {list(logits.shape)} (two heads?), "
            f"of which {head.name} makes the first: pass head={head.name!r} to train that one alone"
        )
    heads = [m for m in model.modules() if is_head_layer(m) and m is not head.module]
    widths = {classes_of(m) for m in heads} - {head.module.weight.shape[1]}  # features are none
    beside = [x for x in output if isinstance(x, Tensor) and x is not logits and x.dim() > 1]
    others = [list(x.shape) for x in beside if x.dim() == logits.dim() and x.shape[1] in widths]
    if others:
        warn(
            f"the network returns several outputs: the first, of shape {list(logits.shape)}, is "
            f"taken for the logits, and not {some(others)} (head={head.name!r} says that this is "
            "right)"
        )


def _not_alone(model: nn.Module, head: Head, shape: list[int], beside: list[str]) -> str:
    """The error message; `beside` names parameters outside of the head that affect the logits."""
    width, name = classes_of(head.module), head.name
    rivals = [
        n
        for n, m in model.named_modules()
        if is_head_layer(m) and classes_of(m) == width and _owns(n, beside)
    ]
    if any("lora_" in n for n in beside if _owns(name.rpartition(".")[0], [n])):
        what = f"an adapter adds to {name}"
        way = "merge it (merge_and_unload), or take the head out of its target_modules"
    elif rivals:
        what = f"two heads (or a residual): {', '.join([*rivals[-3:], name])} make them together"
        way = "let its forward return what one of them makes"
    else:
        what = f"{beside[-1]} adds to {name}" if beside else f"they do not come from {name} alone"
        way = "let its forward return what one linear layer makes"
    return (
        f"no single layer of {type(model).__name__} makes its logits {shape}: {what}; {way}. A "
        "network that ends in features (num_classes=0) needs a head: nn.Sequential(model, "
        f"nn.Linear({shape[-1]}, num_classes))"
    )


def _owns(module: str, parameters: list[str]) -> bool:
    return any(p.startswith(f"{module}.") for p in parameters)
