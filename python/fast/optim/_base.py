"""What AdamW and SGD share: anchors, groups, the stall, checkpoints and the GradScaler contract."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastkernels._update import STATS, compute_dtype

from . import _state
from ._batch import Batch

Group = dict[str, Any]


class AnchoredOptimizer(Optimizer):
    """Base of the optimizers that pull parameters towards anchors; not used by itself."""

    # Names of the moments in the state, as torch's optimizer of the same name has them.
    moments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        defaults: Group,
        *,
        curvature: Any = None,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive; got {max_grad_norm}")
        _state.check_dtype("state_dtype", state_dtype)
        self.max_grad_norm = max_grad_norm
        self.state_dtype = state_dtype
        self._stats: dict[torch.device, Tensor] = {}
        self._hyper: dict[torch.device, tuple[list[list[float]], Tensor]] = {}
        self._step_supports_amp_scaling = True
        common = {"anchor_decay": 0.0, "stall": 0, "ramp": 0, "progress": 0, "maximize": False}
        super().__init__(params, common | defaults | {"curvature": None})
        if curvature is not None:
            self._set_curvature(self._members(), curvature)

    def __getstate__(self) -> dict[str, Any]:
        keep = ("max_grad_norm", "state_dtype", "_step_supports_amp_scaling")
        return super().__getstate__() | {k: getattr(self, k) for k in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stats, self._hyper = {}, {}

    # Groups ----------------------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        """Raise a ValueError that names the key when `group` has a value out of range."""
        raise NotImplementedError

    def _check_common(self, group: Group) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must have one element; got a tensor {list(lr.shape)}")
        for key in ("lr", "weight_decay", "anchor_decay", "stall", "ramp"):
            if not group[key] >= 0:
                raise ValueError(f"{key} must not be negative; got {group[key]}")

    def _members(self) -> list[tuple[Group, Tensor]]:
        """Every parameter with its group, in order."""
        return [(g, p) for g in self.param_groups for p in g["params"]]

    def _hyper_row(self, group: Group, lr: float) -> list[float]:
        """The row of the op's hyper table for `group`."""
        raise NotImplementedError

    def _launch(self, batch: Batch, hyper: Tensor, stats: Tensor) -> None:
        """Run the op on one device's tensors."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; where its `anchor_decay` is not 0, its weights as they are now are its anchor.

        Raises:
            ValueError: a value is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(
                        f"params: {p.dtype} is not supported; give torch.view_as_real(parameter)"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        if group["anchor_decay"]:
            for p in group["params"]:
                self._set_anchor(group, p, p)
        self._absorb_curvature(group)

    def _absorb_curvature(self, group: Group) -> None:
        if group["curvature"] is not None:
            self._set_curvature([(group, p) for p in group["params"]], group["curvature"])
            group["curvature"] = None

    def _set_curvature(self, members: list[tuple[Group, Tensor]], curvature: Any) -> None:
        found = _state.match_curvature([p for _, p in members], curvature)
        for (group, p), f in zip(members, found, strict=True):
            state = self._ensure(group, p)
            if f is None:
                state.pop("curvature", None)
            else:
                state["curvature"] = _state.copy_like(f, p, compute_dtype(p))

    # State -----------------------------------------------------------------------------------

    def _ensure(self, group: Group, p: Tensor) -> dict[str, Any]:
        """The state of `p`, complete: torch's optimizer can load and step whatever is saved."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in self._moments_of(group):
            if state.get(name) is None:
                dtype = self.state_dtype or compute_dtype(p)
                state[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        return state

    def _moments_of(self, group: Group) -> tuple[str, ...]:
        return self.moments

    def _set_anchor(self, group: Group, p: Tensor, value: Tensor) -> None:
        self._ensure(group, p)["anchor"] = _state.copy_like(value, p, p.dtype)

    @torch.no_grad()
    def set_anchors(
        self, anchors: Mapping[Tensor, Tensor] | Sequence[Tensor] | None = None
    ) -> None:
        """Set the weights that parameters are pulled to (and that drift is measured from).

        Args:
            anchors: a tensor per parameter, in the order of the groups; or a mapping from some
                parameters to tensors; or None: every parameter's value now.

        Raises:
            ValueError: number or shapes do not fit.
        """
        members = self._members()
        values = [p for _, p in members] if anchors is None else anchors
        if isinstance(values, Mapping):
            known = {p: group for group, p in members}
            if any(p not in known for p in values):
                raise ValueError("anchors: a key is not a parameter of this optimizer")
            members = [(known[p], p) for p in values]
            values = list(values.values())
        if len(values) != len(members):
            raise ValueError(f"anchors: {len(values)} tensors for {len(members)} parameters")
        for i, ((_, p), value) in enumerate(zip(members, values, strict=True)):
            if p.shape != value.shape:
                raise ValueError(
                    f"anchors[{i}] is {list(value.shape)}, its parameter {list(p.shape)}"
                )
        for (group, p), value in zip(members, values, strict=True):
            self._set_anchor(group, p, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's optimizer of the same name.

        Tensors keep the dtypes this optimizer was built with. Anchors and curvature that the state
        does not have stay as they are, with a warning: they are never taken from the weights.

        Raises:
            ValueError: the groups do not fit, or the state needs what is not supported (amsgrad).
        """
        before = [dict(g) for g in self.param_groups]
        kept = {
            p: {k: s[k] for k in ("anchor", "curvature") if k in s} for p, s in self.state.items()
        }
        if any(g.get("amsgrad") for g in state_dict["param_groups"]):
            raise ValueError("state_dict: amsgrad=True is not supported; train it on with torch")
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before, strict=True):
            for key, value in old.items():
                group.setdefault(key, value)
        saved_ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        missing = 0
        for i, p in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(i, {})
            if not saved and p not in kept:
                continue
            state = self.state[p]
            state.update({k: v for k, v in kept.get(p, {}).items() if k not in saved})
            missing += "anchor" in kept.get(p, {}) and "anchor" not in saved and bool(saved)
            self._adopt(p, state, saved)
        if missing:
            warnings.warn(
                f"the loaded state has no anchor for {missing} anchored parameters: the anchors of "
                "this optimizer stay (its weights when it was built, or set_anchors)",
                stacklevel=2,
            )

    def _adopt(self, p: Tensor, state: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Undo torch's cast of loaded state to the parameter's dtype."""
        if "step" not in saved and any(saved.get(m) is not None for m in self.moments):
            state["step"] = torch.ones(())  # torch's SGD counts no steps; its momentum has begun
        if "step" in state:
            step = torch.as_tensor(saved.get("step", state["step"]), dtype=torch.float32)
            state["step"] = step.to(p.device)
        dtypes = {m: self.state_dtype or compute_dtype(p) for m in self.moments}
        dtypes |= {"anchor": p.dtype, "curvature": compute_dtype(p)}
        for key, dtype in dtypes.items():
            if (value := saved.get(key)) is not None:
                state[key] = _state.adopt(value, p, dtype)

    # The step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient and is not stalled, in one call per device.

        Args:
            closure: re-evaluates the model and returns the loss; it runs with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._collect()
        if self.max_grad_norm is not None and len(batches) > 1:
            raise RuntimeError(
                f"max_grad_norm needs all parameters on one device; they are on "
                f"{sorted(map(str, batches))}: clip with torch.nn.utils.clip_grad_norm_ instead"
            )
        for device, batch in batches.items():
            stats = self._stats.get(device)
            if stats is None:
                stats = torch.full((4,), math.nan, dtype=torch.float64, device=device)
                self._stats[device] = stats
            self._launch(batch, self._hyper_table(batch, device), stats)
        for group in self.param_groups:
            group["progress"] += 1
        return loss

    def _collect(self) -> dict[torch.device, Batch]:
        batches: dict[torch.device, Batch] = {}
        for group in self.param_groups:
            self._absorb_curvature(group)
            after_stall = group["progress"] - group["stall"]
            if after_stall < 0:
                continue
            # The first step after the stall already moves: 1/ramp, 2/ramp, ..., 1.
            ramp = min(1.0, (after_stall + 1) / group["ramp"]) if group["ramp"] else 1.0
            anchored = bool(group["anchor_decay"])
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients; "
                        "build the embedding with sparse=False"
                    )
                state = self._ensure(group, p)
                if anchored and "anchor" not in state:
                    raise RuntimeError(
                        "anchor_decay is set but a parameter has no anchor: call set_anchors(...); "
                        "it is not taken from weights that may have moved"
                    )
                batch = batches.get(p.device)
                if batch is None:
                    batch = batches[p.device] = Batch(self.moments)
                batch.add(p, grad, state, batch.row(group, ramp))
        return batches

    def _hyper_table(self, batch: Batch, device: torch.device) -> Tensor:
        """The op's table `[groups, columns]`; kept between steps while nothing in it changes."""
        rows, tensors = [], {}
        for i, (group, ramp) in enumerate(batch.rows):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                tensors[i] = lr * ramp
                lr = 0.0
            rows.append(self._hyper_row(group, float(lr) * ramp))
        known = self._hyper.get(device)
        if known is None or known[0] != rows or tensors:
            known = rows, torch.tensor(rows, dtype=torch.float64, device=device)
            self._hyper[device] = known
        for i, lr in tensors.items():
            known[1][i, 0].copy_(lr.reshape(()))
        return known[1]

    def stats(self) -> dict[str, Tensor]:
        """Figures of the last step, as float64 tensors `[]` on the device; reading them may sync.

        `grad_norm` (unscaled, before clipping), `drift` `||w - w0||` and `forgetting`
        `1/2 sum F (w - w0)^2` over the anchored parameters (NaN without any), `update_norm`
        `||w' - w||`: of the parameters the step updated. NaN before the first step.
        """
        values = list(self._stats.values())
        if not values:
            return {name: torch.full((), math.nan, dtype=torch.float64) for name in STATS}
        total = values[0]
        if len(values) > 1:
            device = total.device
            stacked = torch.stack([v.to(device) for v in values])
            total = torch.cat([stacked[:, :3].square().sum(0).sqrt(), stacked[:, 3:].sum(0)])
        return dict(zip(STATS, total.clone().unbind(), strict=True))
