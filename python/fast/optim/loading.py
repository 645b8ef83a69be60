"""Loading a checkpoint: of this library or of torch's optimizer, into the dtypes of this one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fast.optim import storage
from fast.optim.batch import Group
from fast.optim.storage import CODE_FORMAT, State, Storage


class LoadingOptimizer(Optimizer):
    """What `AnchoredOptimizer` does with a state dict; not used by itself."""

    # Names of the moments in the state, as torch's optimizer of the same name has them; whether
    # that counts steps; keys by which its groups are known, and more where they are not ours.
    moments: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = True
    own_keys: ClassVar[frozenset[str]] = frozenset()
    torch_keys: ClassVar[frozenset[str]] = frozenset()

    storage: Storage

    def _members(self) -> list[tuple[Group, Tensor]]:
        raise NotImplementedError

    def _check_group(self, group: Group) -> None:
        raise NotImplementedError

    def _ensure(self, group: Group, p: Tensor) -> State:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's optimizer of the same name.

        Tensors are stored in the dtypes this optimizer was built with. Group options, anchors and
        curvature that the state does not have stay as they are, anchors with a warning: they are
        never taken from the weights.

        Raises:
            ValueError: the state is of another optimizer (its groups or entries are others'), the
                groups or a tensor do not fit (it is named), or the state needs what is not
                supported (amsgrad, coupled weight decay of Adam). The optimizer is then as it was.
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
        name = type(self).__name__
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"state_dict has no {key!r}: it is not the state of an optimizer")
        for group in state_dict["param_groups"]:
            missing = sorted(self.own_keys - set(group))
            if "anchor_decay" not in group:
                missing += sorted(self.torch_keys - set(group))
            if missing:
                raise ValueError(
                    f"state_dict is not one of {name}: its groups have no {', '.join(missing)}; if "
                    f"its moments are those of {name} all the same, add the keys to its groups"
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
            self._check_group(self.defaults | group | {"params": []})
        owners = [(i, g) for g in state_dict["param_groups"] for i in g["params"]]
        for (i, group), (_, p) in zip(owners, self._members(), strict=False):
            saved, where = state_dict["state"].get(i, {}), f"state_dict: state[{i}]"
            if not isinstance(saved, Mapping):
                raise ValueError(f"{where} must be a dict; got {type(saved).__name__}")
            self._check_names(saved, group, where)
            storage.check_saved(
                saved, (*self.moments, "anchor", "curvature", "remainder"), p, where
            )

    def _check_names(self, saved: Mapping[str, Any], group: Group, where: str) -> None:
        """Raise a ValueError when a saved state has not the entries of this optimizer."""
        tensors = (*self.moments, "anchor", "curvature")
        known = {"step", "remainder", *tensors}
        known |= {f"{name}_{part}" for name in tensors for part in ("codes", "scales")}
        if "exp_avg_sq" in self.moments:
            known.add("max_exp_avg_sq")  # torch leaves it where amsgrad was switched off
        name = type(self).__name__
        if unknown := sorted(map(repr, set(saved) - known)):
            raise ValueError(
                f"{where} has {', '.join(unknown)}, which no {name} has: it is of another "
                "optimizer (bitsandbytes calls the moments state1, state2); rename what means the "
                f"same to {', '.join(self.moments)}, and leave out the rest"
            )
        stored = [m for m in self.moments if storage.is_stored(saved, m)]
        if stored and len(stored) < len(self.moments):
            raise ValueError(f"{where} has {stored[0]} but not all of {self.moments}")
        if not self.counts_steps:
            return
        if stored and "step" not in saved:
            there = (
                f"; its group has step {group['step']}: copy it" if "step" in group else ": add it"
            )
            raise ValueError(f"{where} has {stored[0]} but no 'step'{there} into every state")
        if not stored and saved.get("step", 0):
            raise ValueError(f"{where} has a step but none of {self.moments}")

    def _adopt_all(self, state_dict: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Store what torch has loaded as this optimizer stores it."""
        for group, old in zip(self.param_groups, before["param_groups"], strict=True):
            for key in old:
                group.setdefault(key, old[key])
            group["code_format"] = CODE_FORMAT
        owners = [(i, g) for g in state_dict["param_groups"] for i in g["params"]]
        unanchored = 0
        for (i, saved_group), (group, p) in zip(owners, self._members(), strict=True):
            old, saved = before["state"].get(p, {}), state_dict["state"].get(i, {})
            state: State = {}
            self.state[p] = state
            for name in ("anchor", "curvature"):
                dtype = self.storage.dtype(name, p)
                storage.adopt(
                    state, saved if storage.is_stored(saved, name) else old, name, p, dtype
                )
            unanchored += bool(state_dict["state"]) and "anchor" in old and "anchor" not in saved
            self._adopt(group, p, state, saved, saved_group.get("code_format", 1))
            if not state:
                del self.state[p]
        if unanchored:
            warnings.warn(
                f"the loaded state has no anchor for {unanchored} anchored parameters: they keep "
                "the one they have (their weights when this optimizer was built, or set_anchors)",
                stacklevel=4,
            )

    def _adopt(
        self, group: Group, p: Tensor, state: State, saved: Mapping[str, Any], code_format: int
    ) -> None:
        """Take moments, step and whatever else was saved, without torch's cast to p's dtype."""
        for name in self.moments:
            storage.adopt(state, saved, name, p, self.storage.dtype(name, p), code_format)
        if "step" in saved or any(storage.is_stored(saved, name) for name in self.moments):
            # torch's SGD counts no steps: where there is a momentum, it has begun.
            step = torch.as_tensor(saved.get("step", 1.0))
            state["step"] = step.to(dtype=torch.float32, device=p.device)
        split = self.storage.exact_bf16 and p.dtype == torch.bfloat16
        if split and saved.get("remainder") is not None:
            storage.adopt(state, saved, "remainder", p, torch.int16)
        if state:
            self._ensure(group, p)
