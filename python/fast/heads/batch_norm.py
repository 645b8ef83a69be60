"""What the backbone's batch norms do during adaptation: frozen, kept per task, or plain torch.

Batch norm in train mode forgets by statistics alone: on CIFAR-10 -> digits the source accuracy of a
ResNet-20 fell from .92 to .61 within ten steps without any change of weights. `frozen` is therefore
the default.

A policy changes the class of the batch norms in place, so it holds whenever `model.train()` is
called, survives `copy.deepcopy`, and `isinstance(module, nn.BatchNorm2d)` stays true.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fast.heads.forward import evaluating, forward_logits
from fast.heads.task import TwoTask


class _Policy:
    """Base of the classes that a policy puts in front of a batch norm's own class."""

    plain_class: type[_BatchNorm]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[1], self.plain_class), self.__dict__


class _Frozen(_Policy):
    """Source statistics always; the affine part still learns."""

    def train(self, mode: bool = True) -> Any:
        return cast(Any, super()).train(False)


class _Track(_Policy):
    """Plain torch, but that a batch of one value per channel, which has no variance, takes the
    statistics that were tracked and adds nothing to them."""

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        learns = norm.training
        norm.training = learns and x.numel() != x.shape[1]
        try:
            return cast(Any, super()).forward(x)
        finally:
            norm.training = learns


class _PerTask(_Track, TwoTask):
    """Target statistics and affine, with the source's kept beside them as `source_norm`."""

    source_norm: nn.Module

    def train(self, mode: bool = True) -> Any:
        cast(Any, super()).train(mode)
        self.source_norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.answers_source:
            return self.source_norm(x)
        return cast(Any, super()).forward(x)


_combinations: dict[tuple[type, type], type] = {}


def _combined(policy: type[_Policy], plain: type[_BatchNorm]) -> type:
    if (policy, plain) not in _combinations:
        name = f"{policy.__name__.strip('_')}{plain.__name__}"
        _combinations[policy, plain] = type(name, (policy, plain), {"plain_class": plain})
    return _combinations[policy, plain]


def _rebuild(policy: type[_Policy], plain: type[_BatchNorm]) -> nn.Module:
    cls: Any = _combined(policy, plain)
    return cls.__new__(cls)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms with running statistics, those of nested `source_norm`s left out."""
    kept = {id(m.source_norm) for m in model.modules() if isinstance(m, _PerTask)}
    return [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and id(m) not in kept
    ]


def set_batch_norm(model: nn.Module, policy: str) -> nn.Module:
    """Set what the batch norms of `model` do from now on, in place.

    Args:
        model: any network; one without batch norm is left as it is.
        policy: `"frozen"`: source statistics, also in train mode. `"per_task"`: target statistics
            and affine parameters, the source's kept beside them and used inside `fast.source_task`.
            `"track"`: plain torch. A batch of one value per channel, which torch refuses, takes the
            statistics as they are.

    Raises:
        ValueError: an unknown policy, or one that would throw away statistics kept per task.
    """
    if policy not in ("frozen", "per_task", "track"):
        raise ValueError(f"policy must be frozen, per_task or track; got {policy!r}")
    for norm in _batch_norms(model):
        if isinstance(norm, _PerTask):
            if policy != "per_task":
                raise ValueError(
                    f"batch norm is kept per task already; {policy!r} would lose the source's "
                    "statistics. Call fast.fold_head(model) first"
                )
            continue
        _restore(norm)
        if policy == "frozen":
            mode = norm.training
            norm.__class__ = _combined(_Frozen, type(norm))
            norm.train(mode)
        elif policy == "track":
            norm.__class__ = _combined(_Track, type(norm))
        else:
            source = copy.deepcopy(norm).eval().requires_grad_(False)
            norm.__class__ = _combined(_PerTask, type(norm))
            norm.add_module("source_norm", source)
    return model


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a policy would change anything: a batch norm with running statistics."""
    return bool(_batch_norms(model))


def source_norms(model: nn.Module) -> dict[str, Tensor]:
    """State of the source's batch norms, where they are kept per task, by the names of the plain
    network's; empty otherwise."""
    return {
        f"{name}.{key}": value
        for name, norm in model.named_modules()
        if isinstance(norm, _PerTask)
        for key, value in norm.source_norm.state_dict().items()
    }


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances `[C]` of the batch norms, as they are, not copied."""
    found = [(m.running_mean, m.running_var) for m in _batch_norms(model)]
    return [x for pair in found for x in pair if x is not None]


def estimate_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the target statistics of batch norms kept per task to those of these inputs.

    One forward pass each, of which each counts the same; everything else stays in evaluation mode.
    The source's statistics stay, and batch norms of other policies.

    Args:
        batches: of target inputs; one of a single value per channel does not count.
    """
    norms = [m for m in _batch_norms(model) if isinstance(m, _PerTask)]
    momenta = [norm.momentum for norm in norms]
    before = [{k: b.clone() for k, b in norm._buffers.items() if b is not None} for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: the mean over batches
        try:
            for inputs in batches if norms else ():
                forward_logits(model, inputs)
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not int(cast(Tensor, norm.num_batches_tracked)):
                    for name, value in buffers.items():
                        getattr(norm, name).copy_(value)


def _restore(norm: _BatchNorm) -> None:
    if isinstance(norm, _Policy):
        norm.__class__ = norm.plain_class  # type: ignore[assignment]


def plain_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch norm its own class back; of norms kept per task the target's stays."""
    for norm in _batch_norms(model):
        if isinstance(norm, _PerTask):
            del norm.source_norm
        _restore(norm)
    return model
