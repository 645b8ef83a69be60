"""Parameter groups: checks of their values, anchors and curvature; their ramp and their steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fast import dtensor
from fast.dtensor import Place

Group = dict[str, Any]


def number(name: str, value: Any) -> Any:
    """`value`, a number or a tensor of one element.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have one element; got a tensor {list(value.shape)}")
    if not isinstance(value, (int, float, Tensor)):
        raise ValueError(f"{name} must be a number; got {value!r}")
    return value


def check_numbers(group: Group, *keys: str, finite: bool = True, not_negative: bool = True) -> None:
    """Raise a ValueError that names the first of these keys whose value is out of range."""
    for key in keys:
        value = number(key, group[key])
        if finite and not math.isfinite(value):
            raise ValueError(f"{key} must be finite; got {value}")
        if not_negative and not value >= 0:
            raise ValueError(f"{key} must not be negative; got {value}")


def check_params(params: Sequence[Tensor], in_codes: bool) -> None:
    """Raise a ValueError when a parameter is unfit for an update, or is given twice.

    Args:
        in_codes: a part of the state is stored in 8-bit codes.
    """
    if len(set(map(id, params))) < len(params):
        raise ValueError("params: a parameter is twice in one group; give it once")
    for p in params:
        if not p.is_floating_point():
            way = "give torch.view_as_real(parameter)" if p.is_complex() else "leave it out"
            raise ValueError(f"params: {p.dtype} is not supported; {way}")
        if in_codes and dtensor.is_sharded(p):
            raise ValueError(
                "state_dtype, curvature_dtype: the scales of 8-bit codes cannot be resharded "
                "with a DTensor parameter; use torch.bfloat16"
            )


def match_anchors(
    params: Sequence[Tensor], anchors: Mapping[Tensor, Tensor] | Sequence[Tensor] | None
) -> Mapping[Tensor, Tensor]:
    """An anchor for each of `params`, or for some of them.

    Args:
        anchors: tensors in the order and shapes of `params`; or a mapping from some of them; or
            None: their values now.

    Raises:
        ValueError: number or shapes do not fit.
    """
    if isinstance(anchors, Mapping):
        everything = set(params)
        if any(p not in everything for p in anchors):
            raise ValueError("anchors: a key is not a parameter of this optimizer")
        params, values = list(anchors), list(anchors.values())
    else:
        values = list(params if anchors is None else anchors)
    if len(values) != len(params):
        raise ValueError(f"anchors: {len(values)} tensors for {len(params)} parameters")
    for i, (p, value) in enumerate(zip(params, values, strict=True)):
        if not isinstance(value, Tensor):
            raise ValueError(f"anchors[{i}] must be a tensor; got {type(value).__name__}")
        if p.shape != value.shape:
            raise ValueError(f"anchors[{i}] is {list(value.shape)}, its parameter {list(p.shape)}")
    return dict(zip(params, values, strict=True))


def missing_anchor() -> RuntimeError:
    """The error of a step whose group has an `anchor_decay`, and a parameter without an anchor."""
    return RuntimeError(
        "anchor_decay is set but a parameter has no anchor: call set_anchors(...); it is not taken "
        "from weights that may have moved"
    )


def match_curvature(params: Sequence[Tensor], curvature: Any) -> list[Tensor | None]:
    """A curvature tensor (or None) for each of `params`.

    Args:
        curvature: tensors in the order and shapes of `params`, or an object whose
            `curvature_for(params)` gives such a list (`fast.SourceCard`).

    Raises:
        TypeError: it is no such list.
        ValueError: number or shapes do not fit, or a value is negative or not finite.
    """
    if hasattr(curvature, "curvature_for"):
        curvature = curvature.curvature_for(params)
    if isinstance(curvature, (Tensor, Mapping)) or not isinstance(curvature, Iterable):
        raise TypeError(
            "curvature must be a SourceCard, or a list of a tensor (or None) per parameter; got "
            f"{type(curvature).__name__}"
        )
    tensors = list(curvature)
    if len(tensors) != len(params):
        raise ValueError(f"curvature: {len(tensors)} tensors for {len(params)} parameters")
    for i, (p, f) in enumerate(zip(params, tensors, strict=True)):
        if f is None:
            continue
        if not isinstance(f, Tensor):
            raise TypeError(f"curvature[{i}] must be a tensor or None; got {type(f).__name__}")
        if f.shape != p.shape:
            raise ValueError(f"curvature[{i}] is {list(f.shape)}, its parameter {list(p.shape)}")
        if f.layout is not torch.strided or not f.is_floating_point():
            raise ValueError(f"curvature[{i}] is {f.layout} {f.dtype}; it must be dense and real")
        shard = dtensor.local(f)
        if not bool(((shard >= 0) & shard.isfinite()).all()):
            raise ValueError(
                f"curvature[{i}] has negative or non-finite values; clamp it (a Hessian diagonal "
                "may be negative, a GGN or Fisher diagonal is not)"
            )
    return tensors


def ramp_factor(progress: int, stall: int, ramp: int) -> float:
    """The factor of the learning rate after `progress` steps: 0 during the stall, and then
    1/ramp, 2/ramp, ..., 1. The first step after the stall already moves."""
    steps = progress - stall + 1
    if steps <= 0:
        return 0.0
    return steps / ramp if steps < ramp else 1.0


class Progress:
    """Advances the key `progress` of groups, by which they leave their stall and ramp.

    Whether a step under a GradScaler overflowed, and so does not count, is known on its device
    only. The flag is copied to the host behind the step, and read when it decides something: at the
    next step, which then waits for the step before (not for the passes queued since), and only
    while a group stalls or ramps.
    """

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def count(self, groups: Sequence[Group], found_inf: Tensor | None) -> None:
        """Count a step; `found_inf` (`[]` or `[1]`, on any device) is not 0 where it overflowed."""
        if found_inf is None or not self.warming(groups):
            _advance(groups)
        elif found_inf.device.type == "cuda":
            self._flag = torch.empty(
                found_inf.shape, dtype=found_inf.dtype, pin_memory=True, device="cpu"
            )
            self._flag.copy_(found_inf, non_blocking=True)
            self._event = torch.cuda.current_stream(found_inf.device).record_event()
        else:
            self._flag = found_inf.clone()

    def warming(self, groups: Sequence[Group]) -> bool:
        """Whether a group is still in its stall or ramp."""
        return any(g["progress"] < g["stall"] + g["ramp"] for g in groups)

    def check_capture(self, groups: Sequence[Group], places: Iterable[Place]) -> None:
        """Raise a RuntimeError in a CUDA graph, which would replay the learning rate of a ramp."""
        if not any(place.device.type == "cuda" for place in places):
            return
        if torch.cuda.is_current_stream_capturing() and self.warming(groups):
            raise RuntimeError(
                "a group is still in its stall or ramp, which a captured graph would repeat for "
                "ever: step until it is over before capturing"
            )

    def settle(self, groups: Sequence[Group]) -> None:
        """Count the last step if it is still open."""
        flag, event = self._flag, self._event
        self._flag = self._event = None
        if event is not None:
            event.synchronize()
        if flag is not None and not flag.any():
            _advance(groups)


def is_trial(groups: Sequence[Group]) -> bool:
    """Whether a step is that of torch.distributed.checkpoint, which fills the states of an
    optimizer that has none: the first one, at learning rate 0, with gradients of 0."""
    if torch.compiler.is_compiling() or any(group.get("progress") for group in groups):
        return False
    rates = [group.get("lr", 1.0) for group in groups]
    if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates) or any(rates):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and float(dtensor.norm(grads)) == 0


def _advance(groups: Sequence[Group]) -> None:
    for group in groups:
        group["progress"] += 1
