"""Whether one layer alone makes a classifier's logits: asked of the network, not of its names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fast.data.trees import pick
from fast.heads.find import Head, classes_of, is_head_layer
from fast.heads.forward import call, evaluating, logits_of


@torch.enable_grad()
def check_alone(model: nn.Module, head: Head, sample: Any, *, named: bool, learns: bool) -> None:
    """Raise where replacing `head` would not replace the classifier.

    Two rows of the sample run with the outputs of the layer set to zero. Then the logits of a row
    are equal, unless something beside the layer makes part of them (a second head, a residual, a
    learned prior); what would do so later (an adapter that starts at zero) has a gradient already.
    The network is left as it was.

    Args:
        head: as `find_head` found it.
        sample: a batch of inputs.
        named: the user has named the layer.
        learns: the layer is to start at zero, and has to learn from there.

    Raises:
        ValueError: the network has several heads, or none, or one that cannot learn from zero; the
            message names the layers.
    """
    zeros: list[Tensor] = []

    def silence(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return zeros[-1].clone()  # what follows may work in place

    hook = head.module.register_forward_hook(silence)
    try:
        with evaluating(model), torch.enable_grad():  # which evaluating switches off
            output = call(model, pick(sample, slice(2)))
    finally:
        hook.remove()
    logits = logits_of(output)
    if logits.dim() < 2:
        raise ValueError(
            f"the network answers with shape {list(logits.shape)} for 2 samples, and a classifier "
            "has logits [B, C]: let its forward return them as they are, not squeezed"
        )
    if not named:
        _check_one_answer(output, logits, head)
    own = {id(p) for p in head.module.parameters()}
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    moved = [False] * (len(zeros) + len(others))
    rows = logits.float().flatten(1)
    if logits.requires_grad:
        # Weights that differ: a sum of logits would not react behind a log-softmax.
        weights = torch.arange(1.0, rows.shape[1] + 1, device=rows.device)
        asked = [*zeros, *others.values()]
        found = torch.autograd.grad((rows * weights).sum(), asked, allow_unused=True)
        moved = [g is not None and bool(g.any()) for g in found]
    past = [name for name, m in zip(others, moved[len(zeros) :], strict=True) if m]
    rows = rows.detach()
    spread = rows.amax(1) - rows.amin(1)
    equal = bool((spread <= 1e-5 * (1 + rows.abs().amax(1))).all())
    if past or not equal:
        raise ValueError(_not_alone(model, head, list(logits.shape), past))
    if learns and not any(moved[: len(zeros)]):
        raise ValueError(
            f"the logits do not react to a zero head at {head.name}: a ReLU or a stop-gradient "
            "follows it. Remove that, or pass max_entropy=False (--no-max-entropy), which starts "
            "it at random"
        )


def _check_one_answer(output: Any, logits: Tensor, head: Head) -> None:
    if not isinstance(output, (tuple, list)):
        return
    alike = [x for x in output if isinstance(x, Tensor) and x.shape == logits.shape]
    if len(alike) > 1:
        raise ValueError(
            f"the network returns {len(alike)} answers of shape {list(logits.shape)} (two heads?), "
            f"of which {head.name} makes the first: pass head={head.name!r} to train that one alone"
        )


def _not_alone(model: nn.Module, head: Head, shape: list[int], past: list[str]) -> str:
    width, name = classes_of(head.module), head.name
    rivals = [
        n
        for n, m in model.named_modules()
        if is_head_layer(m) and classes_of(m) == width and _owns(n, past)
    ]
    if any("lora_" in n for n in past if _owns(name.rpartition(".")[0], [n])):
        what = f"an adapter adds to {name}"
        way = "merge it (merge_and_unload), or take the head out of its target_modules"
    elif rivals:
        what = f"two heads (or a residual): {', '.join([*rivals[-3:], name])} make them together"
        way = "let its forward return what one of them makes"
    else:
        what = f"{past[-1]} adds to {name}" if past else f"they do not come from {name} alone"
        way = "let its forward return what one linear layer makes"
    return (
        f"no single layer of {type(model).__name__} makes its logits {shape}: {what}; {way}. A "
        "network that ends in features (num_classes=0) needs a head: nn.Sequential(model, "
        f"nn.Linear({shape[-1]}, num_classes))"
    )


def _owns(module: str, parameters: list[str]) -> bool:
    return any(p.startswith(f"{module}.") for p in parameters)
