"""Split a classifier into the backbone and head groups that fine-tuning methods need."""

from __future__ import annotations

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
    replaced = task_head(model)
    head_module = replaced.linear if replaced is not None else find_head(model, sample).module
    head_ids = {id(p) for p in own_parameters(model, head_module)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model has no parameter with requires_grad=True: nothing can be trained")
    if replaced is not None and not any(p.requires_grad for p in replaced.linear.parameters()):
        raise ValueError(
            "the new head is frozen (requires_grad=False), and would stay at its zeros. "
            "get_peft_model freezes what it wraps: wrap the pretrained network first, and call "
            "fast.replace_head(model, num_classes) on the wrapped one"
        )
    body = [p for p in trainable if id(p) not in head_ids]
    head = [p for p in trainable if id(p) in head_ids]
    curvature = backbone.pop("curvature", None)
    listed = isinstance(curvature, (list, tuple))
    if listed and len(curvature) != len(body):
        raise ValueError(
            f"param_groups: curvature has {len(curvature)} entries for {len(body)} backbone "
            "parameters"
        )
    weight_decay = backbone.pop("weight_decay", 0.0)
    layers: dict[Tensor, int] = {}
    exempt: set[Tensor] = set()
    if layer_decay is not None:
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1]; got {layer_decay}")
        layers, head_layer = _layers(unwrap(model), set(body))
        exempt = _exempt_from_weight_decay(unwrap(model))

    def groups(name: str, params: list[nn.Parameter], **keys: Any) -> list[dict[str, Any]]:
        parts: dict[tuple[int, bool], list[int]] = {}
        for i, p in enumerate(params):
            plain = bool(weight_decay) and (p.dim() <= 1 or p in exempt)
            parts.setdefault((layers.get(p, -1), plain), []).append(i)
        result = []
        for (layer, plain), part in sorted(parts.items()):
            group = {"params": [params[i] for i in part], "name": name, **keys}
            if layer_decay is not None and layer >= 0:
                group["name"] += f"_layer_{layer}"
                group["lr"] *= layer_decay ** (head_layer - layer)
            if plain:
                group["name"] += "_no_decay"
            group["weight_decay"] = 0.0 if plain else weight_decay
            if listed and "curvature" in keys:
                group["curvature"] = [curvature[i] for i in part]
            result.append(group)
        return result

    if curvature is not None:
        backbone["curvature"] = curvature
    return groups("backbone", body, lr=lr, **backbone) + groups(
        "head", head, lr=lr * head_lr_scale, anchor_decay=0.0
    )


def _layers(model: nn.Module, body: set[nn.Parameter]) -> tuple[dict[Tensor, int], int]:
    """The layer number of each parameter of `body`, counted from the input, and that of the head.

    Raises:
        ValueError: there are fewer than two layers.
    """
    layers: dict[Tensor, int] = {}
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        numbers = group_parameters(model, matcher(coarse=False), reverse=True)
        layers = {p: numbers[name] for name, p in model.named_parameters() if p in body}
        return layers, max(numbers.values())
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
