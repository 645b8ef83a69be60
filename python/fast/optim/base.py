"""What AdamW and SGD share: anchors, groups, the step, checkpoints and the GradScaler contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fast import dtensor
from fast.dtensor import Place
from fast.errors import warn
from fast.optim import loading
from fast.optim.batch import StepFigures, UpdateBatch, by_place, with_gradients
from fast.optim.groups import (
    Group,
    Progress,
    check_numbers,
    check_params,
    is_trial,
    match_anchors,
    match_curvature,
    missing_anchor,
    number,
    ramp_factor,
)
from fast.optim.hyper import HyperTables
from fast.optim.scaling import scale, unscale_
from fast.optim.storage import (
    CODE_FORMAT,
    State,
    Storage,
    StoredTensor,
    complete,
    drop,
)
from fast.profiling import named_range

# A plain function, because it is faster to call: a step of many small tensors is mostly Python.
_layout_of = Tensor.layout.__get__  # type: ignore[attr-defined]


class AnchoredOptimizer(Optimizer):
    """Base of the optimizers that pull parameters towards anchors; not used by itself."""

    format: ClassVar[loading.Format]

    def __init__(
        self,
        params: Any,
        defaults: Group,
        *,
        curvature: Any,
        max_grad_norm: float | None,
        seed: int,
        **storage: Any,
    ) -> None:
        if max_grad_norm is not None and not number("max_grad_norm", max_grad_norm) > 0:
            raise ValueError(f"max_grad_norm must be positive; got {max_grad_norm}")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63); got {seed!r}")
        self.storage = Storage(**storage)
        self.max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self.seed = seed
        self._begin()
        self._step_supports_amp_scaling = True
        keys = {"restraint": 1.0, "progress": 0, "curvature": None, "code_format": CODE_FORMAT}
        super().__init__(params, defaults | keys)
        if curvature is not None:
            self._set_curvature(self._members(), curvature)

    def __getstate__(self) -> dict[str, Any]:
        self._progress.settle(self.param_groups)
        own = ("storage", "max_grad_norm", "seed", "_step_supports_amp_scaling")
        return super().__getstate__() | {key: getattr(self, key) for key in own}  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("restraint", 1.0)  # states of earlier versions and of torch have none
        formats = {group.get("code_format", 1) for group in self.param_groups}
        is_pickle = "storage" in state  # and not the groups of a state_dict, which are converted
        if is_pickle and self.storage.state_dtype == torch.uint8 and formats - {CODE_FORMAT}:
            raise ValueError(
                f"a pickled optimizer with 8-bit codes of format {min(formats)}, not "
                f"{CODE_FORMAT}: load its state_dict() into a new one instead"
            )
        self._begin()

    def _begin(self) -> None:
        self._hyper = HyperTables()
        self._figures = StepFigures()
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
        check_numbers(group, "lr", "weight_decay", "restraint")
        check_numbers(group, "anchor_decay", "stall", "ramp", finite=False)

    def _check_group(self, group: Group) -> None:
        """Raise a ValueError when a value of `group` is out of range, or a parameter unfit."""
        self._check_values(group)
        check_params(group["params"], in_codes=self.storage.codes)

    def _group_moments(self, group: Group) -> tuple[str, ...]:
        """The moments that the parameters of `group` have."""
        return self.format.moments

    def _hyper_row(self, group: Group, lr: float) -> list[float]:
        """The row of the op's hyper table for `group`."""
        raise NotImplementedError

    def _launch(self, batch: UpdateBatch, hyper: Tensor, options: dict[str, Any]) -> None:
        """Run the op on one device's tensors."""
        raise NotImplementedError

    # Groups.

    def _members(self) -> list[tuple[Group, Tensor]]:
        """Every parameter with its group, in order."""
        return [(g, p) for g in self.param_groups for p in g["params"]]

    def add_param_group(self, param_group: Group) -> None:
        """Add a group. Where its `anchor_decay` is not 0, its present weights are its anchors.

        Raises:
            ValueError: a value is out of range, or a parameter is complex.
        """
        self._progress.settle(self.param_groups)  # the new group does not count an open step
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if group["anchor_decay"]:
                for p in group["params"]:
                    self._set_anchor(group, p, p)
            self._absorb_curvature(group)
        except Exception:
            self.param_groups.pop()
            for p in group["params"]:
                self.state.pop(p, None)
            raise
        if self.state or dtensor.any_sharded(group["params"]):
            self._complete(self._members())

    def _absorb_curvature(self, group: Group) -> None:
        """Move curvature given as a group key into the state, where it is saved and loaded."""
        if group["curvature"] is not None:
            self._set_curvature([(group, p) for p in group["params"]], group["curvature"])
            group["curvature"] = None

    def _set_curvature(self, members: list[tuple[Group, Tensor]], curvature: Any) -> None:
        tensors = match_curvature([p for _, p in members], curvature)
        for (group, p), f in zip(members, tensors, strict=True):
            state = self._ensure(group, p)
            drop(state, "curvature")
            if f is not None:
                self._store(state, "curvature", f, p)

    # State.

    def _ensure(self, group: Group, p: Tensor) -> State:
        """The state of `p`, complete."""
        state: State = self.state[p]
        complete(state, p, self._group_moments(group), self.storage)
        return state

    def _complete(self, members: Iterable[tuple[Group, Tensor]]) -> None:
        """Give each of these parameters a state if it has none.

        torch.distributed.checkpoint assumes that all parameters have a state if any has one.
        """
        for group, p in members:
            if p.requires_grad and not self.state.get(p):
                self._ensure(group, p)

    def _store(self, state: State, name: str, value: Tensor, p: Tensor) -> None:
        dtype = self.storage.dtype(name, p)
        StoredTensor.encode(name, value, p, dtype).write(state, name)

    def _set_anchor(self, group: Group, p: Tensor, value: Tensor) -> None:
        self._store(self._ensure(group, p), "anchor", value, p)

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
        values = match_anchors([p for _, p in members], anchors)
        for group, p in members:
            if p in values:
                self._set_anchor(group, p, values[p])
        self._complete(members)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it: `load_state_dict` of this class and of torch's take it.

        It waits for the last step. Moments in 8-bit codes are ours alone: load them into an
        optimizer of this class with `state_dtype=None` first, and its state into torch's.
        """
        self._progress.settle(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's optimizer of the same name.

        Tensors are stored in the dtypes this optimizer was built with. Group options, anchors and
        curvature that the state lacks stay as they are (a warning says so for anchors, because
        they are never taken from the weights); only `restraint` becomes 1.

        Raises:
            ValueError: the state belongs to another kind of optimizer, its groups or a tensor do
                not fit (the message names it), or it needs something unsupported (amsgrad, Adam's
                coupled weight decay). The optimizer is then as it was.
        """
        before = self.__dict__.copy()
        original: dict[str, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            original.update(state_dict)
            loading.check_state_dict(state_dict, self.format, [p for _, p in self._members()])
            for group in state_dict["param_groups"]:
                self._check_group(self.defaults | group | {"params": []})

        # As the last pre-hook and the first post-hook these let other hooks see the state as it was
        # saved, and then as it is stored here.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(
                lambda _: self._adopt(original, before), prepend=True
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

    def _adopt(self, original: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Store what torch has loaded in this optimizer's own form."""
        for group, old_group in zip(self.param_groups, before["param_groups"], strict=True):
            for key in old_group:
                group.setdefault(key, old_group[key])
            group["code_format"] = CODE_FORMAT
        owners = [(i, group) for group in original["param_groups"] for i in group["params"]]
        without_anchor = 0
        for (i, saved_group), (group, p) in zip(owners, self._members(), strict=True):
            entries, old = original["state"].get(i, {}), before["state"].get(p, {})
            if original["state"] and p.requires_grad:
                without_anchor += "anchor" in old and "anchor" not in entries
            state = loading.loaded_state(
                p,
                entries,
                old,
                moments=self.format.moments,
                storage=self.storage,
                code_format=saved_group.get("code_format", 1),
            )
            self.state.pop(p, None)
            if state:
                self.state[p] = state
                self._ensure(group, p)
        if without_anchor:
            warn(
                f"the loaded state has no anchor for {without_anchor} anchored parameters: they "
                "keep the one they have (their weights when this optimizer was built, or "
                "set_anchors)",
            )

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
                "step() inside torch.inference_mode() would create state that no later step may "
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
        if not self.state and is_trial(self.param_groups):
            self._complete(self._members())
            return
        with named_range("fast::collect"):
            batches = self._collect()
        tables = {
            place: self._hyper.table(place, batch, self._hyper_row, self._check_values)
            for place, batch in batches.items()
        }
        self._progress.check_capture(self.param_groups, batches)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scaling = scale(batches, self.max_grad_norm, grad_scale, found_inf)
        figures = self._figures
        figures.has_anchor.clear()
        for place, batch in batches.items():
            batch.move_states()
            options = batch.options(self.storage) | scaling.options()
            # Not bool(), which dynamo of torch 2.11 does not trace for a list.
            figures.has_anchor[place] = len(options["anchors"]) > 0
            stats = figures.stats_at(place)
            self._launch(batch, tables[place], options | {"stats": stats, "seed": self.seed})
            if place.groups or scaling.shrink is not None:
                figures.totals[place] = scaling.totals(place, stats, figures.totals)
            else:
                figures.totals.pop(place, None)
        if grad_scale is not None:
            grads = [p.grad for _, p in self._members() if p.grad is not None]
            unscale_(grads, grad_scale, scaling.found_inf)
        self._progress.count(self.param_groups, scaling.found_inf)

    def _collect(self) -> dict[Place, UpdateBatch]:
        """What this step updates, by place."""
        batches: dict[Place, UpdateBatch] = {}
        for group in self.param_groups:
            self._absorb_curvature(group)
            stall, ramp = group["stall"], group["ramp"]
            if not (type(stall) is type(ramp) is int and stall >= 0 and ramp >= 0):
                self._check_values(group)
            factor = ramp_factor(group["progress"], stall, ramp)
            if not factor:
                self._complete((group, p) for p in group["params"])
                continue
            params, grads = with_gradients(group["params"])
            if any(layout is not torch.strided for layout in set(map(_layout_of, grads))):
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; build the embedding "
                    "with sparse=False"
                )
            states = self._states(group, params)
            for place, members in by_place(params, grads).items():
                batch = batches.setdefault(place, UpdateBatch(place.device))
                row = batch.row(group, factor)
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
        # A state gets all its moments at once, so it is enough to look for the last. SGD's momentum
        # may be switched on later; any other moment that is not there was deleted by somebody, and
        # `UpdateBatch` refuses the state.
        moments = self._group_moments(group)
        last = moments[-1] if moments else "step"
        if self.storage.state_dtype == torch.uint8 and moments:
            last += "_codes"
        for i, state in enumerate(states):
            if not state or (last not in state and not self.format.counts_steps):
                states[i] = self._ensure(group, params[i])
        if self.storage.exact_bf16:
            for state, p in zip(states, params, strict=True):
                if p.dtype != torch.bfloat16:  # model.float() after the state was made
                    state.pop("remainder", None)
                elif "remainder" not in state:  # model.bfloat16() after
                    self._ensure(group, p)
        if group["anchor_decay"] and not all("anchor" in state for state in states):
            raise missing_anchor()
        return states

    def stats(self) -> dict[str, Tensor]:
        """Figures of the last step, as float64 tensors `[]` on the device; reading one may sync.

        `grad_norm` (unscaled, before clipping) and `update_norm` `||w' - w||` cover the parameters
        that the step updated; `drift` `||w - w0||` and `forgetting` `1/2 sum F (w - w0)^2` (`F` is
        1 without curvature) cover those of them with an anchor, and are NaN if none has one. A
        skipped step leaves the figures as they were; before the first step they are NaN. With
        sharded parameters they cover all ranks.
        """
        return self._figures.by_name()
