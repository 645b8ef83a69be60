"""Split a classifier into the backbone and head groups that fine-tuning methods need."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from fast.heads import find_head, own_parameters, task_head, unwrap

OPTIMIZER_KEYS = {"betas", "eps", "momentum", "dampening", "nesterov", "maximize", "weight_decay"}
KEYS = OPTIMIZER_KEYS | {"anchor_decay", "curvature", "stall", "ramp", "restraint"}


def param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    head_lr_scale: float = 10.0,
    *,
    sample: Any = None,
    layer_decay: float | None = None,
    **backbone: Any,
) -> list[dict[str, Any]]:
    """Parameter groups `backbone` and `head` for `fast.AdamW`, `fast.SGD` or `UnfusedPull`.

    The head is what `fast.replace_head` made, or else the layer that makes the logits. It has no
    anchor: there is nothing to be pulled back to. Frozen parameters (the source head among them)
    are left out; shared ones are listed once, and weights that the head shares with the backbone (a
    tied embedding) are the backbone's. With weight decay, biases and norms (one dimension or
    none) go to groups of their own without it.

    Args:
        model: a classifier.
        lr: learning rate of the backbone.
        head_lr_scale: learning rate of the head, as a multiple of `lr`. Ten times is what lets the
            head carry signal before the backbone has moved.
        sample: a batch of inputs, which finds a head that was not replaced and has no usual name.
        layer_decay: learning rate of a layer as a multiple of the next layer's; the backbone's last
            layer has `lr * layer_decay` (BEiT: Bao et al. 2021). The layers are timm's
            (`group_matcher`), or the children of the outermost `ModuleList`s and `Sequential`s.
            Groups are named `backbone_layer_0`, ...; parameters that the model's
            `no_weight_decay()` names have no weight decay. The `lr` of a group is scaled already,
            and there is no `lr_scale`, by which timm's schedulers would multiply once more.
        **backbone: further keys of the backbone group: `anchor_decay`, `stall`, `ramp`,
            `weight_decay`, ... `weight_decay` holds for the head too; a list `curvature` is in the
            order of the backbone's trainable parameters.

    Returns:
        dicts with `params`, `name`, `lr` and the given keys; empty groups are left out.

    Raises:
        ValueError: no head was found, nothing can be trained or not the new head, `curvature` has
            another length, or `layer_decay` is not in (0, 1] or finds no layers.
        TypeError: a key that no optimizer here knows.
    """
    if unknown := sorted(set(backbone) - KEYS):
        raise TypeError(
            f"param_groups: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(KEYS))}"
        )
    body, head = _backbone_and_head(model, sample)
    curvature = backbone.pop("curvature", None)
    if curvature is not None:
        backbone["curvature"] = curvature
    if isinstance(curvature, (list, tuple)) and len(curvature) != len(body):
        raise ValueError(
            f"param_groups: curvature has {len(curvature)} entries for {len(body)} backbone "
            "parameters"
        )
    layers = None if layer_decay is None else _layers(unwrap(model), set(body), layer_decay)
    of_both = {"weight_decay": backbone.pop("weight_decay", 0.0)}
    of_backbone = {"name": "backbone", "lr": lr, **backbone, **of_both}
    of_head = {"name": "head", "lr": lr * head_lr_scale, "anchor_decay": 0.0, **of_both}
    return _groups(body, of_backbone, layers) + _groups(head, of_head, layers)


def _backbone_and_head(
    model: nn.Module, sample: Any
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of the backbone, and those of the head.

    Raises:
        ValueError: no head was found, nothing can be trained, or not the new head.
    """
    new_head = task_head(model)
    head_module = new_head.linear if new_head is not None else find_head(model, sample).module
    in_head = {id(p) for p in own_parameters(model, head_module)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model has no parameter with requires_grad=True: nothing can be trained")
    if new_head is not None and not any(p.requires_grad for p in new_head.linear.parameters()):
        raise ValueError(
            "the new head is frozen (requires_grad=False), and would stay at its zeros. "
            "get_peft_model freezes what it wraps: wrap the pretrained network first, and call "
            "fast.replace_head(model, num_classes) on the wrapped one"
        )
    body = [p for p in trainable if id(p) not in in_head]
    return body, [p for p in trainable if id(p) in in_head]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a network, and the learning rates and weight decay that depend on them.

    Attributes:
        number: layer of each parameter of the backbone, counted from the input.
        head: the head's number.
        decay: see `layer_decay` of `param_groups`.
        exempt: parameters without weight decay.
    """

    number: dict[Tensor, int]
    head: int
    decay: float
    exempt: set[Tensor]


def _groups(
    params: list[nn.Parameter], keys: dict[str, Any], layers: Layers | None
) -> list[dict[str, Any]]:
    """Groups of `params` with these keys: one for each layer, with and without weight decay."""
    members: dict[tuple[int, bool], list[int]] = {}
    for i, p in enumerate(params):
        layer = -1 if layers is None else layers.number.get(p, -1)
        exempt = p.dim() <= 1 or (layers is not None and p in layers.exempt)
        members.setdefault((layer, bool(keys["weight_decay"]) and exempt), []).append(i)
    groups = []
    for (layer, exempt), rows in sorted(members.items()):
        group = {"params": [params[i] for i in rows], **keys}
        if layers is not None and layer >= 0:
            group["name"] += f"_layer_{layer}"
            group["lr"] *= layers.decay ** (layers.head - layer)
        if exempt:
            group["name"] += "_no_decay"
            group["weight_decay"] = 0.0
        if isinstance(group.get("curvature"), (list, tuple)):
            group["curvature"] = [group["curvature"][i] for i in rows]
        groups.append(group)
    return groups


def _layers(model: nn.Module, body: set[nn.Parameter], decay: float) -> Layers:
    """The layers of a network whose backbone has the parameters `body`.

    Raises:
        ValueError: `decay` is out of range, or there are fewer than two layers.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1]; got {decay}")
    matcher: Any = getattr(model, "group_matcher", None)
    number: dict[Tensor, int]
    if matcher is not None:
        from timm.models import group_parameters

        layer_of = group_parameters(model, matcher(coarse=False), reverse=True)
        number = {p: layer_of[name] for name, p in model.named_parameters() if p in body}
        head = max(layer_of.values())
    else:
        number, head = _by_blocks(model, body)
    exempt = _exempt_from_weight_decay(model)
    return Layers(number=number, head=head, decay=decay, exempt=exempt)


def _by_blocks(model: nn.Module, body: set[nn.Parameter]) -> tuple[dict[Tensor, int], int]:
    """The layer of each parameter of `body` by the blocks of the network, and that of the head.

    Raises:
        ValueError: there are fewer than two layers.
    """
    layer_of: dict[Tensor, int] = {}
    last = 0
    for block in blocks_of(model, body):
        # A norm between two layers belongs to the first.
        last += any(p.dim() > 1 for p in block.parameters())
        layer_of.update(dict.fromkeys(block.parameters(), last))
    if last < 2:
        raise ValueError(
            f"layer_decay: {type(model).__name__} has no ModuleList or Sequential of layers; leave "
            "it out, and scale the lr of groups of your own"
        )
    # What stands before the blocks (embeddings, a stem) is layer 0; what follows one belongs to it.
    layers: dict[Tensor, int] = {}
    layer = 0
    for p in model.parameters():
        if p in body:
            layers[p] = layer = layer_of.get(p, layer)
    return layers, last + 1


def blocks_of(module: nn.Module, body: set[nn.Parameter]) -> list[nn.Module]:
    """The children of the outermost containers in `module` that hold parameters of `body`."""
    children = [c for c in module.children() if any(p in body for p in c.parameters())]
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1:
        return children
    return [block for child in children for block in blocks_of(child, body)]


def _exempt_from_weight_decay(model: nn.Module) -> set[Tensor]:
    """The parameters that timm's `no_weight_decay()` of a model names (position embeddings)."""
    no_weight_decay: Any = getattr(model, "no_weight_decay", set)
    patterns = no_weight_decay()
    return {p for name, p in model.named_parameters() if any(fnmatch(name, x) for x in patterns)}
