"""Split a classifier into backbone and head groups, as the fine-tuning methods want them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fast.heads import find_head, own_parameters, task_head

OPTIMIZER_KEYS = {"betas", "eps", "momentum", "dampening", "nesterov", "maximize", "weight_decay"}
KEYS = OPTIMIZER_KEYS | {"anchor_decay", "curvature", "stall", "ramp", "restraint"}


def param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    head_lr_scale: float = 10.0,
    *,
    sample: Any = None,
    **backbone: Any,
) -> list[dict[str, Any]]:
    """Parameter groups `backbone` and `head` for `fast.AdamW` or `fast.SGD`.

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
        sample: a batch of inputs, to find a head by that was not replaced and has no usual name.
        **backbone: further keys of the backbone group: `anchor_decay`, `stall`, `ramp`,
            `weight_decay`, ... `weight_decay` holds for the head too; a list `curvature` is in the
            order of the backbone's trainable parameters.

    Returns:
        dicts with `params`, `name`, `lr` and the given keys; empty groups are left out.

    Raises:
        ValueError: no head was found, nothing can be trained, or `curvature` has another length.
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
    weight_decay = backbone.pop("weight_decay", 0.0)

    def groups(name: str, params: list[nn.Parameter], **keys: Any) -> list[dict[str, Any]]:
        if not weight_decay:
            return [{"params": params, "name": name, "weight_decay": 0.0, **keys}]
        found = []
        for suffix, decay, part in (
            ("", weight_decay, [i for i, p in enumerate(params) if p.dim() > 1]),
            ("_no_decay", 0.0, [i for i, p in enumerate(params) if p.dim() <= 1]),
        ):
            group = {"params": [params[i] for i in part], "name": name + suffix, **keys}
            if isinstance(keys.get("curvature"), (list, tuple)):
                group["curvature"] = [keys["curvature"][i] for i in part]
            found.append(group | {"weight_decay": decay})
        return found

    body = [p for p in trainable if id(p) not in head_ids]
    given = backbone.get("curvature")
    if isinstance(given, (list, tuple)) and len(given) != len(body):
        raise ValueError(
            f"param_groups: curvature has {len(given)} entries for {len(body)} backbone parameters"
        )
    head = [p for p in trainable if id(p) in head_ids]
    result = groups("backbone", body, lr=lr, **backbone)
    result += groups("head", head, lr=lr * head_lr_scale, anchor_decay=0.0)
    return [g for g in result if g["params"]]
