"""Check and convert saved states, this library's or those of torch's optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast import dtensor
from fast.optim.groups import Group
from fast.optim.storage import (
    CODE_FORMAT,
    State,
    Storage,
    StoredTensor,
    is_stored,
    signed,
)
from fastkernels import codes as codec


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the state dict of an optimizer looks like.

    Attributes:
        name: name of the optimizer, for messages.
        moments: names of the moments in the state, as torch's optimizer of the same name has them.
        group_keys: keys by which its groups are recognised.
        torch_keys: further keys that only torch's groups have.
        counts_steps: whether torch's state has a `step`.
    """

    name: str
    moments: tuple[str, ...]
    group_keys: frozenset[str]
    torch_keys: frozenset[str] = frozenset()
    counts_steps: bool = True


def check_state_dict(state_dict: Mapping[str, Any], form: Format, params: Sequence[Tensor]) -> None:
    """Raise a ValueError when a state dict does not have this format, or does not fit `params`.

    The values in its groups are not checked here, and torch checks the number of groups.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}: it is not the state of an optimizer")
    for group in state_dict["param_groups"]:
        _check_group(group, form)
    owners = [(i, group) for group in state_dict["param_groups"] for i in group["params"]]
    for (i, group), p in zip(owners, params, strict=False):
        state, where = state_dict["state"].get(i, {}), f"state_dict: state[{i}]"
        if not isinstance(state, Mapping):
            raise ValueError(f"{where} must be a dict; got {type(state).__name__}")
        _check_names(state, group, form, where)
        _check_tensors(state, form, p, where)


def _check_group(group: Group, form: Format) -> None:
    missing = sorted(form.group_keys - set(group))
    if "anchor_decay" not in group:
        missing += sorted(form.torch_keys - set(group))
    if missing:
        raise ValueError(
            f"state_dict is not one of {form.name}: its groups have no {', '.join(missing)}; "
            f"if its moments are those of {form.name} all the same, add the keys to its groups"
        )
    if group.get("code_format", 1) not in (1, CODE_FORMAT):
        raise ValueError(
            f"state_dict: its 8-bit codes are of format {group['code_format']}, this "
            f"version knows up to {CODE_FORMAT}; load it with the one that wrote it"
        )
    if group.get("amsgrad"):
        raise ValueError("state_dict: amsgrad=True is not supported; go on with torch's")
    if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
        raise ValueError(
            "state_dict is one of Adam, whose weight decay goes into the gradient; set it "
            "to 0 or start anew"
        )


def _check_names(state: Mapping[str, Any], group: Group, form: Format, where: str) -> None:
    """Raise a ValueError when a saved state does not have the entries of this format."""
    moments = form.moments
    tensors = (*moments, "anchor", "curvature")
    names = {"step", "remainder", *tensors}
    names |= {f"{name}_{part}" for name in tensors for part in ("codes", "scales")}
    if "exp_avg_sq" in moments:
        names.add("max_exp_avg_sq")  # torch leaves it where amsgrad was switched off
    if unknown := sorted(map(repr, set(state) - names)):
        raise ValueError(
            f"{where} has {', '.join(unknown)}, which no {form.name} has: it is of another "
            "optimizer (bitsandbytes calls the moments state1, state2); rename what means the "
            f"same to {', '.join(moments)}, and leave out the rest"
        )
    present = [name for name in moments if is_stored(state, name)]
    if present and len(present) < len(moments):
        raise ValueError(f"{where} has {present[0]} but not all of {moments}")
    if not present and group.get("momentum") and group["dampening"] and state.get("step", 0):
        raise ValueError(
            f"{where} has a step and no {moments[0]}. torch.distributed.checkpoint loads what a "
            "state has already, which is no momentum before the first step where it is dampened: "
            "set the dampening of the groups to 0 before get_state_dict, and it is loaded, too"
        )
    if not form.counts_steps:
        return
    if present and "step" not in state:
        way = f"; its group has step {group['step']}: copy it" if "step" in group else ": add it"
        raise ValueError(f"{where} has {present[0]} but no 'step'{way} into every state")
    if not present and state.get("step", 0):
        raise ValueError(f"{where} has a step but none of {moments}")


def _check_tensors(state: Mapping[str, Any], form: Format, p: Tensor, where: str) -> None:
    """Raise a ValueError that names the entry when a saved state does not fit `p`."""
    step = state.get("step", 0)
    if not isinstance(step, (int, float, Tensor)) or torch.as_tensor(step).numel() != 1:
        raise ValueError(f"{where}['step'] must be one number; got {step!r}")
    if not 0 <= float(step) < math.inf:
        raise ValueError(f"{where}['step'] must be finite and not negative; got {float(step)}")
    shapes: dict[str, Sequence[int]] = {}
    for name in (*form.moments, "anchor", "curvature", "remainder"):
        shapes |= {name: p.shape, f"{name}_codes": p.shape}
        shapes[f"{name}_scales"] = (codec.code_scales(p.numel()),)
        if f"{name}_codes" in state and f"{name}_scales" not in state:
            raise ValueError(f"{where} has {name}_codes but no {name}_scales")
    for key, shape in shapes.items():
        value = state.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}[{key!r}] must be a tensor; got {type(value).__name__}")
        if value.shape != torch.Size(shape):
            raise ValueError(
                f"{where}[{key!r}] is {list(value.shape)}, but must be {list(shape)} for its "
                f"parameter {list(p.shape)}: the state is of another model or order of parameters"
            )


def loaded_state(
    p: Tensor,
    entries: Mapping[str, Any],
    before: Mapping[str, Any],
    *,
    moments: Sequence[str],
    storage: Storage,
    code_format: int,
) -> State:
    """The state of `p` after loading, which may lack moments.

    Args:
        entries: the state as it was saved, before torch casts it to the dtype of `p`.
        before: the present state of `p`, whose anchor and curvature stay if `entries` has none.
        code_format: format of the 8-bit codes in `entries`.
    """
    state: State = {}
    for name in ("anchor", "curvature"):
        source = entries if is_stored(entries, name) else before
        # Curvature has no sign, and an anchor no codes: their format has never changed.
        _take(state, source, name, p, storage.dtype(name, p))
    for name in moments:
        _take(state, entries, name, p, storage.dtype(name, p), code_format)
    if "step" in entries or any(is_stored(entries, name) for name in moments):
        # torch's SGD counts no steps, but a momentum shows that there was at least one.
        step = torch.as_tensor(entries.get("step", 1.0))
        state["step"] = step.to(dtype=torch.float32, device=p.device)
    if storage.exact_bf16 and p.dtype == torch.bfloat16:
        _take(state, entries, "remainder", p, torch.int16)
    return state


def _take(
    state: State,
    entries: Mapping[str, Any],
    name: str,
    p: Tensor,
    dtype: torch.dtype,
    code_format: int = CODE_FORMAT,
) -> None:
    """Take the tensor `name` from a saved state, as it is (not copied) where it fits."""
    tensor = StoredTensor.read(entries, name)
    if tensor is None:
        return
    values = dtensor.like(tensor.values, p)
    fits = values.dtype == dtype and values.device == p.device and values.stride() == p.stride()
    if fits and not (tensor.scales is not None and code_format == 1 and signed(name)):
        tensor = StoredTensor(values=values, scales=tensor.scales)
    else:
        tensor = StoredTensor.encode(name, tensor.decode(name, code_format), p, dtype)
    tensor.write(state, name)
