"""SGD with momentum and a pull towards the pretrained weights, in one pass over memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import fastkernels
from fast import dtensor
from fast.optim.base import AnchoredOptimizer
from fast.optim.batch import UpdateBatch
from fast.optim.groups import Group, check_numbers
from fast.optim.loading import Format
from fast.optim.storage import State, drop, is_stored


class SGD(AnchoredOptimizer):
    """torch's SGD, and after each step a proximal pull to the anchor `w0`.

    `w <- (sgd(w) + c w0) / (1 + c)` with `c = lr * anchor_decay * F`. The arguments not named here
    are those of `fast.optim.AdamW`.

    Args:
        lr: learning rate; a float, or a tensor of one element.
        momentum: as in torch.optim.SGD.
        dampening: as in torch.optim.SGD.
        nesterov: as in torch.optim.SGD.
        weight_decay: coupled pull to zero (it goes through the momentum), as in torch.optim.SGD.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    format: ClassVar[Format] = Format(
        name="SGD",
        moments=("momentum_buffer",),
        group_keys=frozenset({"momentum", "dampening", "nesterov"}),
        counts_steps=False,
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        anchor_decay: float = 0.0,
        curvature: Any = None,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        *,
        anchor_dtype: torch.dtype | None = None,
        curvature_dtype: torch.dtype | None = None,
        exact_bf16: bool = False,
        seed: int = 0,
        stall: int = 0,
        ramp: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        self._refuse(differentiable=differentiable)
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "anchor_decay": anchor_decay, "stall": stall, "ramp": ramp,
            "maximize": maximize, "foreach": foreach, "fused": fused,
        }  # fmt: skip
        super().__init__(
            params,
            defaults,
            curvature=curvature,
            max_grad_norm=max_grad_norm,
            seed=seed,
            state_dtype=state_dtype,
            anchor_dtype=anchor_dtype,
            curvature_dtype=curvature_dtype,
            exact_bf16=exact_bf16,
        )

    def _check_values(self, group: Group) -> None:
        super()._check_values(group)
        check_numbers(group, "momentum")
        check_numbers(group, "dampening", not_negative=False)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov needs a momentum and zero dampening")

    def _group_moments(self, group: Group) -> tuple[str, ...]:
        return super()._group_moments(group) if group["momentum"] else ()

    def _ensure(self, group: Group, p: Tensor) -> State:
        has_momentum = is_stored(self.state[p], "momentum_buffer")
        state = super()._ensure(group, p)
        if not has_momentum and self._group_moments(group):
            state["step"].zero_()  # at step 0 a momentum starts as the gradient, without dampening
        return state

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        for group, entry in zip(self.param_groups, state_dict["param_groups"], strict=True):
            # torch starts a missing momentum undamped, as we do at step 0, but dampens one of
            # zeros. A sharded state stays complete, as torch.distributed.checkpoint needs it.
            if not group["dampening"] or dtensor.any_sharded(group["params"]):
                continue
            for i in entry["params"]:
                state = state_dict["state"].get(i, {})
                if is_stored(state, "momentum_buffer") and not state["step"].any():
                    state_dict["state"][i] = state = dict(state)
                    drop(state, "momentum_buffer")
        return state_dict

    def _hyper_row(self, group: Group, lr: float) -> list[float]:
        return [
            lr, group["momentum"], group["dampening"], float(group["nesterov"]),
            group["weight_decay"], group["anchor_decay"], float(group["maximize"]),
        ]  # fmt: skip

    def _launch(self, batch: UpdateBatch, hyper: Tensor, options: dict[str, Any]) -> None:
        momentum_buffers, momentum_scales = batch.moment("momentum_buffer", optional=True)
        on = [bool(group["momentum"]) for group, _ in batch.rows]
        if not all(on):
            # A group whose momentum was switched off keeps its buffers, unused, as torch's does.
            pairs = zip(momentum_buffers, batch.groups, strict=True)
            momentum_buffers = [b if on[row] else batch.nothing for b, row in pairs]
        if not torch.compiler.is_compiling():
            _refuse_empty(momentum_buffers, batch, on)
        fastkernels.anchored_sgd_(
            batch.params, batch.grads, momentum_buffers, batch.column("step"), hyper, batch.groups,
            momentum_scales=momentum_scales, **options,
        )  # fmt: skip


def _refuse_empty(buffers: list[Tensor], batch: UpdateBatch, on: list[bool]) -> None:
    """Raise a ValueError for an empty buffer of a group with momentum, which the op would skip."""
    try:
        if 0 not in map(Tensor.numel, buffers):
            return
    except TypeError:  # something there is no tensor, which the op names
        return
    for b, p, row in zip(buffers, batch.params, batch.groups, strict=True):
        if on[row] and p.numel() and not b.numel():
            raise ValueError(
                f"a momentum_buffer is {list(b.shape)}, its parameter {list(p.shape)}; delete it "
                "from the state to begin a new one"
            )
