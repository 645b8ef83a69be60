"""The optimizer of an adaptation: the fused one, or any other with the pull beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fast import dtensor
from fast.adapt.config import AdaptConfig
from fast.adapt.methods import METHODS
from fast.adapt.network.drift import Drift
from fast.adapt.plan import Plan
from fast.adapt.setup import Setup
from fast.curvature.card import SourceCard
from fast.errors import counted, some, warn
from fast.heads.task import two_task_modules
from fast.optim import SGD, AdamW
from fast.optim.groups import is_trial
from fast.optim.param_groups import param_groups
from fast.optim.unfused import UnfusedPull
from fast.ranks import Ranks

Groups = list[dict[str, Any]]
ADAPTERS, RATES = "adapters", "rates"  # keys of the state
MakeOptimizer = Callable[[Groups], Optimizer]


KIND = (
    "optimizer must be 'adamw', 'sgd' or a function of parameter groups that returns a "
    "torch.optim.Optimizer"
)


class AdaptedOptimizer:
    """An optimizer over backbone and head, anchored at the weights as they are now.

    Args:
        model: with its new head, or the one it keeps.
        setup: has the settings of the parameter groups, and inputs to find a kept head by.
        card: of the source, or None; it weights the pull if the method has a weighted one.
        make: a function that makes any optimizer of parameter groups; None takes the fused one that
            the plan names. An optimizer that is made keeps its own learning rate, unless the user
            gave `lr`.

    Attributes:
        optimizer: `fast.AdamW`, `fast.SGD`, or the one that was made.
        plan: the plan with the learning rate that the optimizer has.
        weighted: whether the card's curvature weights the pull.
        drift: how far the backbone is from its anchors.
    """

    def __init__(
        self,
        model: nn.Module,
        setup: Setup,
        *,
        card: SourceCard | None,
        make: MakeOptimizer | None,
    ) -> None:
        self.plan = plan = setup.plan
        self.weighted = card is not None and METHODS[plan.method].card_decay is not None
        groups = _groups(model, plan, setup.sample)
        weights = card if self.weighted else None
        self.unfused: UnfusedPull | None = None
        if make is not None:
            self.optimizer = self._foreign(groups, make, setup.config.lr is not None)
            _weigh(self.optimizer.param_groups, weights)
            self.unfused = UnfusedPull(self.optimizer, grad_norm=True)
        else:
            _weigh(groups, weights)
            fused: Any = AdamW
            options: dict[str, Any] = {"max_grad_norm": plan.max_grad_norm}
            if plan.optimizer == "sgd":
                fused, options["momentum"] = SGD, 0.9
            self.optimizer = fused(groups, **options)
        self._base = [group["anchor_decay"] for group in _backbone(self.optimizer.param_groups)]
        self.drift = self._drift()
        self._left_out = [] if plan.adapter_rank else _left_out(model, self.params)
        self._loaded = False
        self.optimizer.register_load_state_dict_post_hook(self._has_loaded)

    def _has_loaded(self, _: Optimizer) -> None:
        self._loaded = True

    def _foreign(self, groups: Groups, make: MakeOptimizer, own_lr: bool) -> Optimizer:
        if not self.plan.weight_decay:
            for group in groups:
                del group["weight_decay"]  # the optimizer has a default of its own
        if not own_lr:
            for group in groups:
                del group["lr"]
        optimizer = make(groups)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{KIND}; it returned {type(optimizer).__name__}")
        if not hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):  # timm's Lookahead
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} wraps another one and is no whole "
                "torch.optim.Optimizer (it has no hooks): return the inner one, and wrap "
                "adaptation.optimizer afterwards"
            )
        if not all("name" in group for group in optimizer.param_groups):
            raise ValueError(
                "optimizer: the function has dropped the parameter groups that it was given, which "
                "say what is head and what is pulled back; pass them on as they are: "
                f"lambda groups: {type(optimizer).__name__}(groups)"
            )
        if not own_lr:
            self.plan = replace(self.plan, lr=float(optimizer.param_groups[0]["lr"]))
            for group in optimizer.param_groups:
                if group["name"].startswith("head"):
                    group["lr"] = group["lr"] * self.plan.head_lr_scale
        return optimizer

    def _drift(self) -> Drift:
        params = [p for group in _backbone(self.optimizer.param_groups) for p in group["params"]]
        unfused: dict[Tensor, Tensor] = self.unfused.anchors if self.unfused is not None else {}
        state = self.optimizer.state
        anchors = []
        for p in params:
            anchor = unfused.get(p)
            if anchor is None and p in state:
                anchor = state[p].get("anchor")
            anchors.append(p.detach().clone() if anchor is None else anchor)
        return Drift(params, anchors)

    @property
    def params(self) -> list[Tensor]:
        """All parameters that are trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def lr(self) -> float:
        """The backbone's learning rate, before its ramp."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) * float(group.get("restraint", 1.0))

    @property
    def rate(self) -> float:
        """The backbone's learning rate, before its ramp, as a share of the plan's."""
        return self.lr / self.plan.lr if self.plan.lr else 0.0

    def is_trial(self) -> bool:
        """Whether the step that was taken only fills the optimizer's states."""
        return is_trial(self.optimizer.param_groups)

    def stats(self) -> dict[str, Tensor]:
        """Figures of the last step: see `fast.AdamW.stats`."""
        owner: Any = self.unfused if self.unfused is not None else self.optimizer
        return owner.stats()

    def set_pull(self, factor: float) -> None:
        """Multiply the pull of the backbone."""
        # Look the groups up anew each time: loading a state replaces them.
        for group, base in zip(_backbone(self.optimizer.param_groups), self._base, strict=True):
            group["anchor_decay"] = base * factor

    def restrain(self, factor: float) -> None:
        """Multiply the learning rate of all groups, on top of what a scheduler sets."""
        for group in self.optimizer.param_groups:
            group["restraint"] = factor

    def check_used(self) -> None:
        """Raise where the weights have moved although this optimizer has taken no step.

        Without steps there is no average but the first weights, to which a run would return.

        Raises:
            RuntimeError: they have moved.
        """
        if moved := self.drift():
            raise RuntimeError(
                f"the weights have moved by {moved:.3g}, and adaptation.optimizer has taken no "
                "step: the loop steps another optimizer, which holds nothing of the source. Step "
                "adaptation.optimizer (Adaptation(optimizer=lambda groups: ...) makes one of "
                "yours); if it has loaded a checkpoint, let it load the adaptation's state, too"
            )

    def warn_left_out(self) -> None:
        """Warn, once, where parameters were frozen when the groups were made, and are not now."""
        late = [(name, p) for name, p in self._left_out if p.requires_grad and p.grad is not None]
        have = {id(p) for p in self.params} if late else set()  # the loop may have added a group
        names = [name for name, p in late if id(p) not in have]
        if names:
            self._left_out = []
            warn(
                f"{counted(len(names), 'parameter')} of the network ({some(names)}) can learn only "
                "since the Adaptation was made (requires_grad), and adaptation.optimizer does not "
                "have them, so that they stay as they are: let them learn when it is made, and "
                "freeze them after that, for as long as they are to stay"
            )

    def check_averaged(self, ranks: Ranks) -> None:
        """Raise where the processes have taken a step with gradients of their own.

        They would go on as networks of their own, and only the first one is saved.

        Raises:
            RuntimeError: they have.
        """
        if ranks.size == 1:
            return
        whole = [p.grad for p in self.params if p.grad is not None and not dtensor.is_sharded(p)]
        sums = torch.stack([g.double().sum() for g in whole]).cpu() if whole else torch.zeros(1)
        if len(set(ranks.all(sums.numpy().tobytes()))) > 1:
            raise RuntimeError(
                "the processes have different gradients in the first step, because nothing "
                "averages them: wrap the network in DistributedDataParallel after fast.Adaptation, "
                "and pass it to forward(..., model=) (docs/distributed.md); with "
                "process_group=None each process trains a network of its own"
            )

    def check_loaded(self, done: int) -> None:
        """Raise where, before the loop's first step, some of model, optimizer and adaptation go on
        from a state, and the others from the beginning.

        Args:
            done: steps that the adaptation has done.

        Raises:
            RuntimeError: that is so; the message says which of them lacks its state.
        """
        if self.is_trial():
            return
        steps = max(group.get("progress", 0) for group in self.optimizer.param_groups)
        lacks = self._lacks_state(done, steps)
        if lacks is not None:
            raise RuntimeError(
                f"{lacks}: model, optimizer and adaptation go on together; load the states of all "
                "three (load_state_dict)"
            )

    def _lacks_state(self, done: int, steps: int) -> str | None:
        """What has loaded a state that another lacks; None where all are alike."""
        if not done and steps:
            return f"the optimizer has loaded a state of step {steps}, and the adaptation none"
        if done and not self._loaded:
            return f"the adaptation has loaded a state of step {done}, and the optimizer none"
        moved = self.drift()
        if not done and moved:
            return f"the weights have moved by {moved:.3g}, and the adaptation has loaded no state"
        # Steps that a gradient scaler skips move nothing, and do not count here.
        if self.drift.params and steps > self.plan.stall + 1 and not moved:
            return f"the adaptation has loaded a state of step {done}, and the model none"
        return None

    def keep_rates(self) -> None:
        """Keep the learning rates as those that a schedule multiplies, if none does so yet.

        Until a schedule begins, the loop may set others.
        """
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", copy.deepcopy(group["lr"]))

    def schedule(self, factor: float) -> None:
        """Set the learning rate of all groups to `factor` times the one that was kept."""
        self.keep_rates()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's own state does not hold.

        Where adapters start is drawn at random, and a process that resumes would draw others.
        torch.distributed.checkpoint loads only the keys that a group has already, and it has the
        rate that a schedule multiplies only once there is a scheduler.
        """
        state = {} if self.unfused is None else self.unfused.state_dict()
        state[RATES] = [group.get("initial_lr") for group in self.optimizer.param_groups]
        if self.plan.adapter_rank:
            state[ADAPTERS] = {str(i): a for i, a in enumerate(self.drift.anchors)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, anchor in enumerate(self.drift.anchors if ADAPTERS in state else ()):
            anchor.copy_(state[ADAPTERS][str(i)])
        for group, rate in zip(self.optimizer.param_groups, state[RATES], strict=True):
            if rate is not None:
                group["initial_lr"] = rate
        if self.unfused is not None:
            self.unfused.load_state_dict(state)


def check_own_optimizer(make: Any, config: AdaptConfig) -> None:
    """Raise TypeError where `make` cannot make an optimizer, and ValueError for what no optimizer
    of the user's own does."""
    if not callable(make):
        given = type(make).__name__
        raise TypeError(
            f"{KIND}; got {given}. The new head has parameters that no optimizer has yet: "
            f"lambda groups: {given}(groups)"
        )
    if config.head_decay:
        raise ValueError(
            "head_decay is for 'adamw' and 'sgd', and this optimizer is your own: set the "
            "weight_decay of the groups whose name begins with 'head' in the function that makes it"
        )
    if config.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm clips inside the fused step, and this optimizer is your own: clip with "
            "torch.nn.utils.clip_grad_norm_(adaptation.params, ...) before you step it"
        )


def _left_out(model: nn.Module, params: list[Tensor]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that no group has, with their names; not those of modules that keep some for
    the source alone."""
    inside = {id(p) for p in params}
    for module in two_task_modules(model):
        inside |= {id(p) for p in module.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in inside]


def _groups(model: nn.Module, plan: Plan, sample: Any) -> Groups:
    groups = param_groups(
        model,
        lr=plan.lr,
        head_lr_scale=plan.head_lr_scale,
        sample=sample,
        anchor_decay=plan.anchor_decay,
        stall=plan.stall,
        ramp=plan.ramp,
        weight_decay=plan.weight_decay,
    )
    for group in groups:
        if not group["name"].startswith("head"):
            continue
        if plan.head == "keep":  # it is pretrained like the rest
            group |= {"anchor_decay": plan.anchor_decay, "stall": plan.stall, "ramp": plan.ramp}
            group["name"] = f"backbone_{group['name']}"
            continue
        group["weight_decay"] = plan.head_decay
        if plan.head_steps:
            group["ramp"] = plan.ramp  # Adam's first step would undo what the head has learned
    return groups


def _weigh(groups: Groups, card: SourceCard | None) -> None:
    """Give the backbone's groups the curvature of a card; it has none of a head that is kept."""
    if card is None:
        return
    params = [p for group in _backbone(groups) for p in group["params"]]
    curvature = dict(zip(params, card.curvature_for(params), strict=True))
    for group in _backbone(groups):
        group["curvature"] = [curvature[p] for p in group["params"]]


def _backbone(groups: Groups) -> Groups:
    """The groups of the backbone; one that the loop has added may have no name."""
    return [group for group in groups if group.get("name", "").startswith("backbone")]
