"""What AdamW and SGD share: anchors, groups, the stall, checkpoints and the GradScaler contract."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fast.profiling import named_range
from fastkernels._update import STATS

from . import _dtensor, _scaling, _state
from ._batch import Batch, Group
from ._dtensor import Place
from ._progress import Progress
from ._state import State, Storage

# As functions: a step of thousands of small tensors is mostly Python, which calls these faster.
_device_of, _layout_of = Tensor.device.__get__, Tensor.layout.__get__  # type: ignore[attr-defined]


class AnchoredOptimizer(Optimizer):
    """Base of the optimizers that pull parameters towards anchors; not used by itself."""

    # Names of the moments in the state, as torch's optimizer of the same name has them.
    moments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        defaults: Group,
        *,
        storage: Storage,
        curvature: Any = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive; got {max_grad_norm}")
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2**64); got {seed!r}")
        self.storage = storage
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self._forget_launches()
        self._step_supports_amp_scaling = True
        super().__init__(params, defaults | {"progress": 0, "curvature": None})
        if curvature is not None:
            self._set_curvature(self._members(), curvature)

    def __getstate__(self) -> dict[str, Any]:
        self._progress.settle(self.param_groups)
        kept = ("storage", "max_grad_norm", "seed", "_step_supports_amp_scaling")
        return super().__getstate__() | {key: getattr(self, key) for key in kept}  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_launches()

    def _forget_launches(self) -> None:
        self._stats: dict[Place, Tensor] = {}  # of this rank
        self._totals: dict[Place, Tensor] = {}  # of all ranks, where parameters are sharded
        self._hyper: dict[Place, tuple[list[list[float]], Tensor]] = {}
        # A dict like the others: torch.compile keeps what is written into it, not an attribute.
        self._anchored: dict[Place, bool] = {}
        self._progress = Progress()

    # Hooks of the subclasses.

    def _refuse(self, **options: bool) -> None:
        """Raise a ValueError for an option of torch's that this optimizer does not have."""
        for name, value in options.items():
            if value:
                raise ValueError(
                    f"{name}=True is not supported; use torch.optim.{type(self).__name__} for it"
                )

    def _check_group(self, group: Group) -> None:
        """Raise a ValueError that names the key when `group` has a value out of range."""
        for key in ("lr", "weight_decay", "anchor_decay", "stall", "ramp"):
            value = group[key]
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{key} must have one element; got a tensor {list(value.shape)}")
            if not value >= 0:
                raise ValueError(f"{key} must not be negative; got {value}")
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(
                    f"params: {p.dtype} is not supported; for a complex parameter give "
                    "torch.view_as_real(parameter)"
                )
            if self.storage.codes and _dtensor.is_sharded(p):
                raise ValueError(
                    "state_dtype, curvature_dtype: the scales of 8-bit codes cannot be resharded "
                    "with a DTensor parameter; use torch.bfloat16"
                )

    def _group_moments(self, group: Group) -> tuple[str, ...]:
        """The moments that the parameters of `group` have."""
        return self.moments

    def _hyper_row(self, group: Group, lr: float) -> list[float]:
        """The row of the op's hyper table for `group`."""
        raise NotImplementedError

    def _launch(self, batch: Batch, hyper: Tensor, options: dict[str, Any]) -> None:
        """Run the op on one device's tensors."""
        raise NotImplementedError

    # Groups.

    def _members(self) -> list[tuple[Group, Tensor]]:
        """Every parameter with its group, in order."""
        return [(g, p) for g in self.param_groups for p in g["params"]]

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; where its `anchor_decay` is not 0, its weights of now are its anchor.

        Raises:
            ValueError: a value is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if group["anchor_decay"]:
                for p in group["params"]:
                    self._set_anchor(group, p, p)
            if _dtensor.any_sharded(group["params"]):
                # torch.distributed.checkpoint takes a state with any entry for a complete one.
                for p in group["params"]:
                    self._ensure(group, p)
            self._absorb_curvature(group)
        except Exception:
            self.param_groups.pop()
            for p in group["params"]:
                self.state.pop(p, None)
            raise

    def _absorb_curvature(self, group: Group) -> None:
        """Move curvature given as a group key into the state, where it is saved and loaded."""
        if group["curvature"] is not None:
            self._set_curvature([(group, p) for p in group["params"]], group["curvature"])
            group["curvature"] = None

    def _set_curvature(self, members: list[tuple[Group, Tensor]], curvature: Any) -> None:
        found = _state.match_curvature([p for _, p in members], curvature)
        for (group, p), f in zip(members, found, strict=True):
            state = self._ensure(group, p)
            _state.drop(state, "curvature")
            if f is not None:
                _state.put(state, "curvature", f, p, self.storage.dtype("curvature", p))

    # State.

    def _ensure(self, group: Group, p: Tensor) -> State:
        """The state of `p`, complete: torch's optimizer can load and step whatever is saved."""
        state: State = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in self._group_moments(group):
            if not _state.is_stored(state, name):
                _state.put_zeros(state, name, p, self.storage.dtype(name, p))
        if self.storage.exact_bf16 and p.dtype == torch.bfloat16 and "remainder" not in state:
            state["remainder"] = _state.dense_like(p, torch.int16).zero_()
        return state

    def _set_anchor(self, group: Group, p: Tensor, value: Tensor) -> None:
        _state.put(self._ensure(group, p), "anchor", value, p, self.storage.dtype("anchor", p))

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
        values: Sequence[Tensor]
        if isinstance(anchors, Mapping):
            known = {p: group for group, p in members}
            if any(p not in known for p in anchors):
                raise ValueError("anchors: a key is not a parameter of this optimizer")
            members, values = [(known[p], p) for p in anchors], list(anchors.values())
        else:
            values = [p for _, p in members] if anchors is None else list(anchors)
        if len(values) != len(members):
            raise ValueError(f"anchors: {len(values)} tensors for {len(members)} parameters")
        for i, ((_, p), value) in enumerate(zip(members, values, strict=True)):
            if p.shape != value.shape:
                raise ValueError(
                    f"anchors[{i}] is {list(value.shape)}, its parameter {list(p.shape)}"
                )
        for (group, p), value in zip(members, values, strict=True):
            self._set_anchor(group, p, value)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: `load_state_dict` of this class and of torch's take it. Waits for a step.

        Moments in 8-bit codes are ours alone: load them into an optimizer of this class with
        `state_dtype=None` first, and its state into torch's.
        """
        self._progress.settle(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's optimizer of the same name.

        Tensors are stored in the dtypes this optimizer was built with. Group options, anchors and
        curvature that the state does not have stay as they are, anchors with a warning: they are
        never taken from the weights.

        Raises:
            ValueError: the groups or a tensor do not fit (it is named), or the state needs what is
                not supported (amsgrad). The optimizer is then as it was.
        """
        before = self.__dict__.copy()
        saved: dict[str, Any] = {}

        def check(_: Optimizer, found: dict[str, Any]) -> None:
            saved.update(found)
            self._check_saved(found)

        # As the last pre-hook and the first post-hook: those of others see what they should, the
        # state as it was saved and as it is stored here.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(
                lambda _: self._adopt_all(saved, before), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _check_saved(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError when a state cannot be loaded; torch checks the groups itself."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("state_dict: amsgrad=True is not supported; go on with torch's AdamW")
        for group in state_dict["param_groups"]:
            self._check_group(self.defaults | group | {"params": []})
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        for i, (_, p) in zip(ids, self._members(), strict=False):
            names = (*self.moments, "anchor", "curvature", "remainder")
            _state.check_saved(state_dict["state"].get(i, {}), names, p, f"state_dict: state[{i}]")

    def _adopt_all(self, state_dict: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Store what torch has loaded as this optimizer stores it."""
        for group, old in zip(self.param_groups, before["param_groups"], strict=True):
            for key in old:
                group.setdefault(key, old[key])
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        unanchored = 0
        for i, (group, p) in zip(ids, self._members(), strict=True):
            old, saved = before["state"].get(p, {}), state_dict["state"].get(i, {})
            state: State = {}
            self.state[p] = state
            for name in ("anchor", "curvature"):
                dtype = self.storage.dtype(name, p)
                _state.adopt(state, saved if _state.is_stored(saved, name) else old, name, p, dtype)
            unanchored += bool(saved) and "anchor" in old and "anchor" not in saved
            self._adopt(group, p, state, saved)
            if not state:
                del self.state[p]
        if unanchored:
            warnings.warn(
                f"the loaded state has no anchor for {unanchored} anchored parameters: they keep "
                "the one they have (their weights when this optimizer was built, or set_anchors)",
                stacklevel=4,
            )

    def _adopt(self, group: Group, p: Tensor, state: State, saved: Mapping[str, Any]) -> None:
        """Take moments, step and whatever else was saved, without torch's cast to p's dtype."""
        for name in self.moments:
            _state.adopt(state, saved, name, p, self.storage.dtype(name, p))
        if "step" in saved or any(_state.is_stored(saved, name) for name in self.moments):
            # torch's SGD counts no steps: where there is a momentum, it has begun.
            step = torch.as_tensor(saved.get("step", 1.0))
            state["step"] = step.to(dtype=torch.float32, device=p.device)
        split = self.storage.exact_bf16 and p.dtype == torch.bfloat16
        if split and saved.get("remainder") is not None:
            _state.adopt(state, saved, "remainder", p, torch.int16)
        if state:
            self._ensure(group, p)

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient and is not stalled, in one call per device.

        Args:
            closure: re-evaluates the model and returns the loss; it runs with gradients enabled.

        Raises:
            RuntimeError: a gradient is sparse; a parameter with `anchor_decay` has no anchor; or
                `max_grad_norm` is set and the parameters are on several devices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with named_range("fast::step"):
            self._update()
        return loss

    def _update(self) -> None:
        self._progress.settle(self.param_groups)
        with named_range("fast::collect"):
            batches = self._collect()
        scaling = _scaling.scale(
            batches,
            self.max_grad_norm,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        self._anchored.clear()
        for place, batch in batches.items():
            options = self._options(batch, place) | scaling.options()
            self._launch(batch, self._hyper_table(batch, place), options)
            if place.groups or scaling.shrink is not None:
                self._totals[place] = scaling.totals(place, self._stats[place], self._totals)
        self._progress.count(self.param_groups, scaling.found_inf)

    def _options(self, batch: Batch, place: Place) -> dict[str, Any]:
        """The arguments that the update ops have in common, but for the scale of gradients."""
        device = place.device
        if batch.states[0]["step"].device != device:  # the model was moved after the state was made
            for state in batch.states:
                state.update({key: value.to(device) for key, value in state.items()})
        split = self.storage.exact_bf16
        if split:
            for state, p in zip(batch.states, batch.params, strict=True):
                if p.dtype != torch.bfloat16:  # model.float() after the state was made
                    state.pop("remainder", None)
        if place not in self._stats:
            unknown = torch.full((len(STATS),), math.nan, dtype=torch.float64)
            self._stats[place] = unknown.to(device)
        curvature, scales = batch.optional("curvature"), []
        if self.storage.curvature_dtype == torch.uint8:
            codes, scales = batch.optional("curvature_codes"), batch.optional("curvature_scales")
            curvature = curvature or [None] * len(codes)
            curvature = [f if c is None else c for f, c in zip(curvature, codes, strict=False)]
        anchors = batch.optional("anchor")
        self._anchored[place] = bool(anchors)
        return {
            "anchors": anchors,
            "curvature": curvature,
            "curvature_scales": scales,
            "remainders": batch.optional("remainder", batch.nothing) if split else [],
            "stats": self._stats[place],
            "seed": self.seed,
        }

    def _collect(self) -> dict[Place, Batch]:
        """What this step updates, by place."""
        batches: dict[Place, Batch] = {}
        for group in self.param_groups:
            self._absorb_curvature(group)
            after_stall = group["progress"] - group["stall"]
            if after_stall < 0:
                continue
            # The first step after the stall already moves: 1/ramp, 2/ramp, ..., 1.
            ramp = min(1.0, (after_stall + 1) / group["ramp"]) if group["ramp"] else 1.0
            params, grads = _with_gradients(group["params"])
            if any(layout is not torch.strided for layout in set(map(_layout_of, grads))):
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; build the embedding "
                    "with sparse=False"
                )
            states = self._states(group, params)
            for place, members in _by_place(params).items():
                batch = batches.setdefault(place, Batch(place.device))
                row = batch.row(group, ramp)
                if members is None:
                    batch.add(params, grads, states, row)
                    continue
                for i in members:
                    p, grad = params[i], _dtensor.like(grads[i], params[i])
                    state = _dtensor.local_state(states[i])
                    batch.add([_dtensor.local(p)], [_dtensor.local(grad)], [state], row)
        return batches

    def _states(self, group: Group, params: list[Tensor]) -> list[State]:
        """The states of these parameters of `group`, complete."""
        states: list[Any] = list(map(self.state.get, params))
        # Moments are made together, so the last one stands for all.
        moments = self._group_moments(group)
        last = moments[-1] if moments else "step"
        if self.storage.state_dtype == torch.uint8 and moments:
            last += "_codes"
        for i, state in enumerate(states):
            if state is None or last not in state:
                states[i] = self._ensure(group, params[i])
        if group["anchor_decay"] and not all("anchor" in state for state in states):
            raise RuntimeError(
                "anchor_decay is set but a parameter has no anchor: call set_anchors(...); it is "
                "not taken from weights that may have moved"
            )
        return states

    def _hyper_table(self, batch: Batch, place: Place) -> Tensor:
        """The op's table `[groups, columns]`; kept between steps while nothing in it changes."""
        rows, device_lrs = [], {}
        for i, (group, ramp) in enumerate(batch.rows):
            lr = group["lr"]
            if isinstance(lr, Tensor) and (
                lr.device.type != "cpu" or torch.compiler.is_compiling()
            ):
                device_lrs[i] = (
                    lr.reshape(()) * ramp
                )  # reading it would be a sync, or a graph break
                lr = 0.0
            rows.append(self._hyper_row(group, float(lr) * ramp))
        known = self._hyper.get(place)
        if known is None or known[0] != rows:
            # Pinned: the lr changes at every step, and a plain copy waits for the device.
            pin = place.device.type == "cuda" and not torch.compiler.is_compiling()
            table = torch.tensor(rows, dtype=torch.float64, pin_memory=pin)
            table = table.to(place.device, non_blocking=pin)
            known = self._hyper[place] = rows, table
        for i, lr in device_lrs.items():
            known[1][i, 0].copy_(lr)
        return known[1]

    def stats(self) -> dict[str, Tensor]:
        """Figures of the last step, as float64 tensors `[]` on the device; reading one may sync.

        `grad_norm` (unscaled, before clipping) and `update_norm` `||w' - w||` of the parameters the
        step updated; `drift` `||w - w0||` and `forgetting` `1/2 sum F (w - w0)^2` (`F` is 1 without
        curvature) of those of them with an anchor, NaN when there is none. A skipped step leaves
        them as they were; before the first step they are NaN. With sharded parameters they are
        those of all ranks.
        """
        values = list((self._stats | self._totals).values())
        total = torch.full((len(STATS),), math.nan, dtype=torch.float64)
        if values:
            stacked = torch.stack([v.to(values[0].device) for v in values])
            total = torch.cat([stacked[:, :3].square().sum(0).sqrt(), stacked[:, 3:].sum(0)])
        figures = dict(zip(STATS, total.unbind(), strict=True))
        if not any(self._anchored.values()):
            for name in ("drift", "forgetting"):
                figures[name] = torch.full_like(figures[name], math.nan)
        return figures


def _with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    grads = [p.grad for p in params]
    found = [g for g in grads if g is not None]
    if len(found) < len(params):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
    return params, found


def _by_place(params: list[Tensor]) -> dict[Place, list[int] | None]:
    """The places of these parameters, each with their indices; None: all of them."""
    if not _dtensor.any_sharded(params):
        devices = set(map(_device_of, params))
        if len(devices) < 2:
            return {Place(device): None for device in devices}
    places: dict[Place, list[int] | None] = {}
    for i, p in enumerate(params):
        places.setdefault(_dtensor.place(p), []).append(i)  # type: ignore[union-attr]
    return places
