"""The pull to the pretrained weights around the step of any optimizer: torch's, timm's, Lion, Muon.

`fast.AdamW` and `fast.SGD` do it in the same pass over memory as their step. The pull is proximal:
it is a step of its own after the optimizer's, so it works with every other update rule as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fast import dtensor
from fast.optim.groups import (
    Group,
    Progress,
    check_numbers,
    check_params,
    is_trial,
    match_anchors,
    match_curvature,
    missing_anchor,
    ramp_factor,
)
from fastkernels.codes import compute_dtype
from fastkernels.ops.update import MAX_PULL, STATS

KEYS: Group = {
    "anchor_decay": 0.0, "curvature": None, "stall": 0, "ramp": 0, "restraint": 1.0, "progress": 0
}  # fmt: skip


class UnfusedPull:
    """Stall, ramp, restraint and pull for the groups of `optimizer`, by its step hooks.

    After each step `w <- (w + c w0) / (1 + c)` with `c = lr * anchor_decay * F`, for the parameters
    that have a gradient; `lr` is the group's, times its ramp and restraint. In its stall a group
    is hidden from the optimizer: neither its parameters nor their state change.

        optimizer = timm.optim.Lion(fast.param_groups(model, lr=1e-4, anchor_decay=1.0, ramp=100))
        pull = fast.optim.UnfusedPull(optimizer)    # nothing else to call

    The keys of a group are those that `fast.AdamW` has: `anchor_decay`, `curvature`, `stall`,
    `ramp` and `restraint` (one that is missing changes nothing), and `progress`, the count of
    steps. Anchors are the weights at the time of construction, of the groups that have an
    `anchor_decay` then.

    Args:
        optimizer: the optimizer to be pulled; `lr` of its groups stays its scheduler's.
        grad_norm: whether each step measures the norm of its gradients, for `stats()`.

    Raises:
        ValueError: a value of a group is out of range, `curvature` does not fit, or a parameter
            with an anchor is complex.
    """

    def __init__(self, optimizer: Optimizer, *, grad_norm: bool = False) -> None:
        self.optimizer = optimizer
        self.anchors: dict[Tensor, Tensor] = {}
        self.curvature: dict[Tensor, Tensor] = {}
        self._grad_norm: Tensor | None = None
        self._measures = grad_norm
        self._progress = Progress()
        # The groups that a step moves, and their learning rates; None between steps.
        self._moving: list[tuple[Group, Any]] | None = None
        self._keys: list[Group] = []  # keys of the groups, while a state is loaded
        self._hidden: dict[Tensor, Tensor] = {}  # gradients of parameters in their stall
        self._undo: list[Callable[[], None]] = []  # undo the other changes that a step makes
        for group in self.optimizer.param_groups:
            self._prepare(group)
            if group["anchor_decay"]:
                self._keep_anchors({p: p for p in group["params"]})
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        )

    def remove(self) -> None:
        """Remove the pull from the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def set_anchors(
        self, anchors: Mapping[Tensor, Tensor] | Sequence[Tensor] | None = None
    ) -> None:
        """Set the weights that parameters are pulled to; see `fast.AdamW.set_anchors`."""
        self._keep_anchors(match_anchors(self._params(), anchors))

    def _keep_anchors(self, anchors: Mapping[Tensor, Tensor]) -> None:
        check_params(list(anchors), in_codes=False)
        for p, value in anchors.items():
            self.anchors[p] = torch.empty_like(p, requires_grad=False)
            self.anchors[p].copy_(dtensor.like(value.detach(), p))

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _prepare(self, group: Group) -> None:
        """Complete and check the keys of a group, and take its curvature out of it."""
        for key, value in KEYS.items():
            group.setdefault(key, value)
        check_numbers(group, "anchor_decay", "stall", "ramp", finite=False)
        check_numbers(group, "restraint")
        if group["curvature"] is not None:
            tensors = match_curvature(group["params"], group["curvature"])
            for p, f in zip(group["params"], tensors, strict=True):
                self.curvature.pop(p, None)
                if f is not None:
                    self.curvature[p] = dtensor.like(f.detach().to(compute_dtype(p)), p).clone()
            group["curvature"] = None  # out of the optimizer's state dict

    # The step.

    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A step that raised did not call its post-hook. Where a subclass's step calls its base's,
        # both hooks run twice: outer pre, inner pre, inner post, outer post.
        self._take_back()
        groups = self.optimizer.param_groups
        self._progress.settle([group for group in groups if "progress" in group])
        moving: list[tuple[Group, Any]] = []
        in_stall: list[Tensor] = []
        try:
            trial = is_trial(groups)  # which has to fill the states of groups in their stall, too
            for group in groups:
                self._prepare(group)
                self._check_anchors(group)
                factor = ramp_factor(group["progress"], group["stall"], group["ramp"])
                if factor or trial:
                    lr = self._scale_lr(group, factor * group["restraint"])
                    moving.append((group, lr))
                else:
                    in_stall += group["params"]
                    self._undo.append(partial(group.update, dict(group)))
        except Exception:
            self._take_back()
            raise
        self._moving = moving
        return self._hide(in_stall, args, kwargs) if in_stall else None

    def _check_anchors(self, group: Group) -> None:
        if group["anchor_decay"] and not all(p in self.anchors for p in group["params"]):
            raise missing_anchor()

    def _scale_lr(self, group: Group, factor: float) -> Any:
        """Multiply the learning rate of a group for one step; returns that of the step."""
        lr = group.get("lr")
        if lr is None:
            if factor == 1 and not group["anchor_decay"]:
                return 0.0
            raise ValueError(
                f"{type(self.optimizer).__name__} has a group without lr, which the pull, the ramp "
                "and the restraint act by: give it one (Adafactor: relative_step=False, lr=...)"
            )
        if factor == 1:
            return lr
        step_lr = group["lr"] = lr * factor

        def restore() -> None:
            if group["lr"] is step_lr:
                group["lr"] = lr

        self._undo.append(restore)
        return step_lr

    def _hide(self, params: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take away the gradients of `params` for the step: every optimizer skips parameters that
        have none. A closure computes them anew, so it is wrapped."""
        self._hide_gradients(params)
        names = dict(zip(("self", "closure"), args, strict=False)) | kwargs
        closure = names.get("closure")
        if closure is None:
            return None

        def hiding() -> Any:
            self._show_gradients()
            loss = closure()
            self._hide_gradients(params)
            return loss

        return args[:1], kwargs | {"closure": hiding}

    def _hide_gradients(self, params: list[Tensor]) -> None:
        for p in params:
            if p.grad is not None:
                self._hidden[p] = p.grad
                p.grad = None

    def _show_gradients(self) -> None:
        for p, grad in self._hidden.items():
            p.grad = grad
        self._hidden.clear()

    def _take_back(self) -> None:
        """Undo what was changed for the step, if anything was."""
        self._show_gradients()
        while self._undo:
            self._undo.pop()()

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self._take_back()
        moving, self._moving = self._moving, None
        if moving is None:  # the outer of two post-hooks
            return
        found_inf = getattr(self.optimizer, "found_inf", None)  # of an optimizer that skips itself
        if found_inf is not None:
            found_inf = dtensor.local(found_inf).reshape(())
        for group, lr in moving:
            if group["anchor_decay"]:
                strength = lr * min(float(group["anchor_decay"]), MAX_PULL)
                if found_inf is not None:
                    strength = strength * (found_inf == 0)
                self._pull([p for p in group["params"] if p.grad is not None], strength)
        if self._measures:
            self._grad_norm = dtensor.norm(p.grad for g, _ in moving for p in g["params"])
        if not is_trial(self.optimizer.param_groups):
            self._progress.count(self.optimizer.param_groups, found_inf)

    def _pull(self, params: list[Tensor], strength: Any) -> None:
        """Pull `params` to their anchors; `strength` `[]` is `c` for `F = 1`."""
        weights = [dtensor.local(p.detach()) for p in params]
        wide = [w.to(compute_dtype(w)) for w in weights]  # w itself, or a copy in float32
        anchors = [
            dtensor.local(self.anchors[p]).to(w.dtype) for p, w in zip(params, wide, strict=True)
        ]
        share: Any
        if isinstance(strength, Tensor) or any(p in self.curvature for p in params):
            share = []
            for p, w in zip(params, wide, strict=True):
                f = self.curvature.get(p)
                share.append(strength * (torch.ones_like(w) if f is None else dtensor.local(f)))
            # c / (1 + c) = 1 / (1 + 1/c), which holds for c = 0 and for infinite c, too.
            torch._foreach_reciprocal_(share)
            torch._foreach_add_(share, 1)
            torch._foreach_reciprocal_(share)
        else:
            share = strength / (1 + strength)
        torch._foreach_lerp_(wide, anchors, share)
        for w, result in zip(weights, wide, strict=True):
            if result is not w:
                w.copy_(result)

    # Figures.

    @torch.no_grad()
    def stats(self) -> dict[str, Tensor]:
        """The figures of `fast.AdamW.stats()`, float64 `[]`, as far as they are known here.

        `drift` `||w - w0||` and `forgetting` `1/2 sum F (w - w0)^2` cover all anchored parameters,
        at their present values; `grad_norm` is the last step's, if measured. The others are NaN.
        """
        figures = dict.fromkeys(STATS, torch.full((), math.nan, dtype=torch.float64))
        if self._grad_norm is not None:
            figures["grad_norm"] = self._grad_norm
        if self.anchors:
            away = {p: p.double() - anchor.double() for p, anchor in self.anchors.items()}
            figures["drift"] = dtensor.norm(away.values())
            terms = (
                away[p] * self.curvature[p].double().sqrt() if p in self.curvature else away[p]
                for p in away
            )
            figures["forgetting"] = dtensor.norm(terms).square() / 2
        return figures

    # Checkpoints.

    def _before_load(self, optimizer: Optimizer, _: Any) -> None:
        self._keys = [{key: group[key] for key in KEYS} for group in optimizer.param_groups]

    def _after_load(self, optimizer: Optimizer) -> None:
        """Restore the keys of the groups, which a state that was saved without a pull removes."""
        for group, keys in zip(optimizer.param_groups, self._keys, strict=True):
            group.update(keys | group)

    def state_dict(self) -> dict[str, Any]:
        """Anchors and curvature by the number of the parameter, and the steps of each group."""
        groups = self.optimizer.param_groups
        self._progress.settle(groups)
        number_of = {p: i for i, p in enumerate(self._params())}
        return {
            "anchors": {number_of[p]: anchor for p, anchor in self.anchors.items()},
            "curvature": {number_of[p]: f for p, f in self.curvature.items()},
            "progress": [group["progress"] for group in groups],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` gave, after the optimizer has loaded its own state.

        Raises:
            ValueError: it is not one of these groups and parameters; nothing is loaded then.
        """
        params, groups = self._params(), self.optimizer.param_groups
        if missing := {"anchors", "curvature", "progress"} - set(state_dict):
            raise ValueError(f"state_dict has no {', '.join(sorted(missing))}: it is no pull's")
        if len(state_dict["progress"]) != len(groups):
            raise ValueError(
                f"state_dict has {len(state_dict['progress'])} groups, the optimizer {len(groups)}"
            )
        for name in ("anchors", "curvature"):
            for i, value in state_dict[name].items():
                shape = list(params[i].shape) if i < len(params) else None
                if list(value.shape) != shape:
                    raise ValueError(
                        f"state_dict: {name}[{i}] is {list(value.shape)}, its parameter {shape}: "
                        "it is of another model or order of parameters"
                    )
        for group, progress in zip(groups, state_dict["progress"], strict=True):
            group["progress"] = progress
        self.anchors.clear()
        self._keep_anchors({params[i]: value for i, value in state_dict["anchors"].items()})
        self.curvature = {
            params[i]: dtensor.like(f.detach(), params[i]).to(params[i].device).clone()
            for i, f in state_dict["curvature"].items()
        }
