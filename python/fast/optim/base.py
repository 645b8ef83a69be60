"""What AdamW and SGD share: anchors, groups, the stall, checkpoints and the GradScaler contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fast.optim import dtensor, storage
from fast.optim.batch import Batch, Group
from fast.optim.dtensor import Place
from fast.optim.loading import LoadingOptimizer
from fast.optim.progress import Progress, ramp_factor
from fast.optim.scaling import scale, unscale_
from fast.optim.storage import CODE_FORMAT, State, Storage
from fast.profiling import named_range
from fastkernels.ops.update import STATS

# As functions: a step of thousands of small tensors is mostly Python, which calls these faster.
_device_of, _layout_of = Tensor.device.__get__, Tensor.layout.__get__  # type: ignore[attr-defined]


class AnchoredOptimizer(LoadingOptimizer):
    """Base of the optimizers that pull parameters towards anchors; not used by itself."""

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
        if max_grad_norm is not None and not number("max_grad_norm", max_grad_norm) > 0:
            raise ValueError(f"max_grad_norm must be positive; got {max_grad_norm}")
        max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63); got {seed!r}")
        self.storage = storage
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self._forget_launches()
        self._step_supports_amp_scaling = True
        keys = {
            "restraint": 1.0, "progress": 0, "curvature": None, "code_format": CODE_FORMAT
        }  # fmt: skip
        super().__init__(params, defaults | keys)
        if curvature is not None:
            self._set_curvature(self._members(), curvature)

    def __getstate__(self) -> dict[str, Any]:
        self._progress.settle(self.param_groups)
        kept = ("storage", "max_grad_norm", "seed", "_step_supports_amp_scaling")
        return super().__getstate__() | {key: getattr(self, key) for key in kept}  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("restraint", 1.0)  # states of earlier versions and of torch have none
        formats = {group.get("code_format", 1) for group in self.param_groups}
        pickled = "storage" in state  # and not the groups of a state_dict, which are converted
        if pickled and self.storage.state_dtype == torch.uint8 and formats - {CODE_FORMAT}:
            raise ValueError(
                f"a pickled optimizer with 8-bit codes of format {min(formats)}, not "
                f"{CODE_FORMAT}: load its state_dict() into a new one instead"
            )
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

    def _check_values(self, group: Group) -> None:
        """Raise a ValueError that names the key when `group` has a value out of range."""
        for key in ("lr", "weight_decay", "restraint"):
            finite(key, group[key])
        for key in ("lr", "weight_decay", "anchor_decay", "stall", "ramp", "restraint"):
            value = number(key, group[key])
            if not value >= 0:
                raise ValueError(f"{key} must not be negative; got {value}")

    def _check_group(self, group: Group) -> None:
        """Raise a ValueError when a value of `group` is out of range, or a parameter unfit."""
        self._check_values(group)
        if len(set(map(id, group["params"]))) < len(group["params"]):
            raise ValueError("params: a parameter is twice in one group; give it once")
        for p in group["params"]:
            if not p.is_floating_point():
                way = "give torch.view_as_real(parameter)" if p.is_complex() else "leave it out"
                raise ValueError(f"params: {p.dtype} is not supported; {way}")
            if self.storage.codes and dtensor.is_sharded(p):
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
        self._progress.settle(self.param_groups)  # an open step is none of the new group's
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if group["anchor_decay"]:
                for p in group["params"]:
                    self._set_anchor(group, p, p)
            if dtensor.any_sharded(group["params"]):
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
        found = storage.match_curvature([p for _, p in members], curvature)
        for (group, p), f in zip(members, found, strict=True):
            state = self._ensure(group, p)
            storage.drop(state, "curvature")
            if f is not None:
                storage.put(state, "curvature", f, p, self.storage.dtype("curvature", p))

    # State.

    def _ensure(self, group: Group, p: Tensor) -> State:
        """The state of `p`, complete: torch's optimizer can load and step whatever is saved."""
        state: State = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in self._group_moments(group):
            if not storage.is_stored(state, name):
                storage.put_zeros(state, name, p, self.storage.dtype(name, p))
        if self.storage.exact_bf16 and p.dtype == torch.bfloat16 and "remainder" not in state:
            state["remainder"] = storage.dense_like(p, torch.int16).zero_()
        return state

    def _set_anchor(self, group: Group, p: Tensor, value: Tensor) -> None:
        storage.put(self._ensure(group, p), "anchor", value, p, self.storage.dtype("anchor", p))

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
            if not isinstance(value, Tensor):
                raise ValueError(f"anchors[{i}] must be a tensor; got {type(value).__name__}")
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

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient and is not stalled, in one call per device.

        Args:
            closure: re-evaluates the model and returns the loss; it runs with gradients enabled.

        Raises:
            ValueError: a value of a group is out of range, or tensors do not fit or share memory.
            RuntimeError: a gradient is sparse; a parameter with `anchor_decay` has no anchor; a
                state lacks a moment; or `max_grad_norm` is set and the parameters are on several
                devices. Nothing is updated then.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step() inside of torch.inference_mode() would make a state that no later step may "
                "write to; use torch.no_grad()"
            )
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
        tables = {place: self._hyper_table(batch, place) for place, batch in batches.items()}
        self._check_capture(batches)
        scaling = scale(
            batches,
            self.max_grad_norm,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        self._anchored.clear()
        for place, batch in batches.items():
            options = self._options(batch, place) | scaling.options()
            self._launch(batch, tables[place], options)
            if place.groups or scaling.shrink is not None:
                self._totals[place] = scaling.totals(place, self._stats[place], self._totals)
            else:
                self._totals.pop(place, None)
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            grads = [p.grad for _, p in self._members() if p.grad is not None]
            unscale_(grads, grad_scale, scaling.found_inf)
        self._progress.count(self.param_groups, scaling.found_inf)

    def _check_capture(self, batches: Mapping[Place, Batch]) -> None:
        """A graph replays what is decided here, once and for all."""
        if not any(place.device.type == "cuda" for place in batches):
            return
        if torch.cuda.is_current_stream_capturing() and self._progress.warming(self.param_groups):
            raise RuntimeError(
                "a group is still in its stall or ramp, which a captured graph would repeat for "
                "ever: step until it is over before capturing"
            )

    def _options(self, batch: Batch, place: Place) -> dict[str, Any]:
        """The arguments that the update ops have in common, but for the scale of gradients."""
        device = place.device
        step = batch.states[0].get("step")
        if step is not None and step.device != device:  # the model was moved since
            for state in batch.states:
                state.update({key: value.to(device) for key, value in state.items()})
        split = self.storage.exact_bf16
        if place not in self._stats:
            unknown = torch.full((len(STATS),), math.nan, dtype=torch.float64, device="cpu")
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
            stall, ramp = group["stall"], group["ramp"]
            if not (type(stall) is type(ramp) is int and stall >= 0 and ramp >= 0):
                self._check_values(group)
            rate = ramp_factor(group["progress"], stall, ramp)
            if not rate:
                continue
            params, grads = _with_gradients(group["params"])
            if any(layout is not torch.strided for layout in set(map(_layout_of, grads))):
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; build the embedding "
                    "with sparse=False"
                )
            states = self._states(group, params)
            for place, members in _by_place(params, grads).items():
                batch = batches.setdefault(place, Batch(place.device))
                row = batch.row(group, rate)
                if members is None:
                    batch.add(params, grads, states, row)
                    continue
                for i in members:
                    p, grad = params[i], dtensor.like(grads[i], params[i])
                    state = dtensor.local_state(states[i])
                    batch.add([dtensor.local(p)], [dtensor.local(grad)], [state], row)
        return batches

    def _states(self, group: Group, params: list[Tensor]) -> list[State]:
        """The states of these parameters of `group`, complete."""
        states: list[Any] = list(map(self.state.get, params))
        # Moments are made together: the last stands for all, and `Batch` misses any other. SGD's
        # may be switched on later; AdamW's were taken away, which `Batch` misses too.
        moments = self._group_moments(group)
        last = moments[-1] if moments else "step"
        if self.storage.state_dtype == torch.uint8 and moments:
            last += "_codes"
        for i, state in enumerate(states):
            if not state or (last not in state and not self.counts_steps):
                states[i] = self._ensure(group, params[i])
        if self.storage.exact_bf16:
            for state, p in zip(states, params, strict=True):
                if p.dtype != torch.bfloat16:  # model.float() after the state was made
                    state.pop("remainder", None)
                elif "remainder" not in state:  # model.bfloat16() after
                    self._ensure(group, p)
        if group["anchor_decay"] and not all("anchor" in state for state in states):
            raise RuntimeError(
                "anchor_decay is set but a parameter has no anchor: call set_anchors(...); it is "
                "not taken from weights that may have moved"
            )
        return states

    def _hyper_table(self, batch: Batch, place: Place) -> Tensor:
        """The op's table `[groups, columns]`; kept, and known to be in range, between steps while
        nothing in it changes.

        Raises:
            ValueError: a value that was changed is out of range.
        """
        rows, device_lrs = [], {}
        for i, (group, ramp) in enumerate(batch.rows):
            lr = group["lr"]
            try:
                restraint = float(group["restraint"])
                if not 0 <= restraint < math.inf:
                    self._check_values(group)
                factor = restraint * ramp
                if isinstance(lr, Tensor) and (
                    lr.device.type != "cpu" or torch.compiler.is_compiling()
                ):
                    # Reading it would be a sync, or a graph break.
                    device_lrs[i] = lr.reshape(()) * factor
                    value = math.nan  # no rate that a group may have later; equal to itself in rows
                else:
                    value = float(lr) * factor
                rows.append(self._hyper_row(group, value))
            except (TypeError, ValueError, RuntimeError):
                self._check_values(group)  # which says more
                raise
        known = self._hyper.get(place)
        if known is None or known[0] != rows:
            for i, (group, _) in enumerate(batch.rows):
                if not torch.compiler.is_compiling():
                    self._check_values(group | {"lr": 0.0} if i in device_lrs else group)
            # Pinned: the lr changes at every step, and a plain copy waits for the device.
            pin = place.device.type == "cuda" and not torch.compiler.is_compiling()
            table = torch.tensor(rows, dtype=torch.float64, pin_memory=pin, device="cpu")
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
        known = self._stats | self._totals
        values = [known[place] for place in self._anchored]
        total = torch.full((len(STATS),), math.nan, dtype=torch.float64, device="cpu")
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


def _by_place(params: list[Tensor], grads: list[Tensor]) -> dict[Place, list[int] | None]:
    """The places of these parameters, each with their indices; None: all of them, as they are."""
    if not dtensor.any_sharded(params) and not dtensor.any_sharded(grads):
        devices = set(map(_device_of, params))
        if len(devices) < 2:
            return {Place(device): None for device in devices}
    places: dict[Place, list[int] | None] = {}
    for i, p in enumerate(params):
        places.setdefault(dtensor.place(p), []).append(i)  # type: ignore[union-attr]
    return places


def number(name: str, value: Any) -> Any:
    """`value`, a number or a tensor of one.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have one element; got a tensor {list(value.shape)}")
    if not isinstance(value, (int, float, Tensor)):
        raise ValueError(f"{name} must be a number; got {value!r}")
    return value


def finite(name: str, value: Any) -> None:
    """Raise a ValueError when `value` is no finite number, or a tensor of one."""
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be finite; got {value}")
