"""What the backbone's batch norms do during adaptation: frozen, kept per task, or plain torch.

Plain batch norm in training mode forgets by statistics alone: from CIFAR-10 to digits the source
accuracy of a ResNet-20 fell from .92 to .61 within ten steps, with all weights as they were.

A policy changes the class of the batch norms in place, so it survives `model.train()` and
`copy.deepcopy`, and `isinstance(module, nn.BatchNorm2d)` stays true.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fast.heads.forward import evaluating, forward_logits
from fast.heads.task import Overlay, TwoTask, put_over, take_off

# The least weight of a batch in the statistics that the target gets, torch's default. Networks that
# were trained for months average over a hundred batches or thousands (EfficientNet, MobileNetV3 and
# MNASNet of torchvision), which is longer than a run.
LEAST_MOMENTUM = 0.1


class _Frozen(Overlay):
    """Always the source statistics; the affine part still learns."""

    def train(self, mode: bool = True) -> Any:
        return cast(Any, super()).train(False)

    def reset_running_stats(self) -> None:
        """Keep them: torch's `update_bn` would reset them, and find no batch in training mode."""


class _Track(Overlay):
    """Plain torch, except that a batch of one value per channel, which has no variance, uses the
    tracked statistics and leaves them as they are."""

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        training = norm.training
        norm.training = training and x.numel() != x.shape[1]
        try:
            return cast(Any, super()).forward(x)
        finally:
            norm.training = training


class _PerTask(_Track, TwoTask):
    """Target statistics and affine parameters; `source_norm` keeps the source's."""

    source_norm: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if self.answers_source:
            return self.source_norm(x)
        return cast(Any, super()).forward(x)


_POLICIES: dict[str, type[Overlay]] = {"frozen": _Frozen, "per_task": _PerTask, "track": _Track}


def _batch_norms(model: nn.Module) -> list[_NormBase]:
    """The batch norms with running statistics, but the `source_norm`s inside them.

    Instance norms that track statistics are among them: they, too, answer by these, and forget by
    them.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    source = {id(m.source_norm) for m in norms if isinstance(m, _PerTask)}
    return [m for m in norms if id(m) not in source]


def set_batch_norm(model: nn.Module, policy: str) -> nn.Module:
    """Set what the batch norms of `model` do from now on, in place.

    Args:
        model: any network; one without batch norm is left as it is.
        policy: `"frozen"` uses the source statistics in training mode too. `"per_task"` has target
            statistics and affine parameters, and uses the source's inside `fast.source_task`.
            `"track"` is plain torch, except that a batch of one value per channel, which torch
            refuses, uses the tracked statistics.

    Raises:
        ValueError: the policy is unknown, or would lose statistics that are kept per task.
    """
    if policy not in _POLICIES:
        raise ValueError(f"policy must be frozen, per_task or track; got {policy!r}")
    for norm in _batch_norms(model):
        if isinstance(norm, _PerTask):
            if policy != "per_task":
                raise ValueError(
                    f"batch norm is kept per task already; {policy!r} would lose the source's "
                    "statistics. Call fast.fold_head(model) first"
                )
            continue
        take_off(norm)
        source = copy.deepcopy(norm).eval().requires_grad_(False) if policy == "per_task" else None
        put_over(norm, _POLICIES[policy])
        if source is not None:
            put_over(source, _Frozen)
            norm.add_module("source_norm", source)
            norm.momentum = max(norm.momentum or 0.0, LEAST_MOMENTUM)
        norm.train(norm.training)
    return model


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a network has batch norms with running statistics, so that a policy matters."""
    return bool(_batch_norms(model))


def has_layer_norm(model: nn.Module) -> bool:
    """Whether a network has layer norms, or what other libraries name so (T5LayerNorm, RMSNorm)."""
    return any(
        name.startswith(("LayerNorm", "RMSNorm")) or name.endswith(("LayerNorm", "RMSNorm"))
        for name in (type(module).__name__ for module in model.modules())
    )


def source_norms(model: nn.Module) -> dict[str, Tensor]:
    """The state of the source's batch norms that are kept per task, by its names in the plain
    network; empty where none are."""
    return {
        f"{name}.{key}": value
        for name, norm in model.named_modules()
        if isinstance(norm, _PerTask)
        for key, value in norm.source_norm.state_dict().items()
    }


def per_task_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The target's affine parameters of batch norms that are kept per task."""
    return [p for norm in per_task_norms(model)[0] for p in norm.parameters(recurse=False)]


def per_task_norms(model: nn.Module) -> tuple[list[_NormBase], list[_NormBase]]:
    """The batch norms that are kept per task: the target's, and in the same order the source's."""
    norms = [m for m in _batch_norms(model) if isinstance(m, _PerTask)]
    return list(norms), [cast(_NormBase, m.source_norm) for m in norms]


def load_source_norms(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Let each task have its own batch norms, the source's with what `source_norms` gave.

    Raises:
        ValueError: the state is of another network.
    """
    set_batch_norm(model, "per_task")
    shapes = {name: value.shape for name, value in source_norms(model).items()}
    odd = [name for name in {**shapes, **state} if _shape(state, name) != shapes.get(name)]
    if odd:
        raise ValueError(f"the source's batch norms are of another network: {odd[0]}")
    for name, norm in model.named_modules():
        if isinstance(norm, _PerTask):
            own = norm.source_norm.state_dict()
            norm.source_norm.load_state_dict({key: state[f"{name}.{key}"] for key in own})


def _shape(state: dict[str, Tensor], name: str) -> Any:
    return state[name].shape if name in state else None


def norm_momenta(model: nn.Module) -> list[tuple[Any, float | None]]:
    """The batch norms, each with the weight of a batch in its statistics."""
    return [(norm, norm.momentum) for norm in _batch_norms(model)]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances `[C]` of the batch norms, not copied."""
    pairs = [(m.running_mean, m.running_var) for m in _batch_norms(model)]
    return [x for pair in pairs for x in pair if x is not None]


@contextmanager
def by_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which batch norms use the statistics of each batch and track them."""
    with evaluating(model):
        for norm in _batch_norms(model):
            norm.training = True
        yield


def estimate_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the target statistics of batch norms that are kept per task, from target inputs.

    Each batch takes one forward pass and counts the same; a batch of one value per channel does not
    count. Everything but these batch norms stays in evaluation mode.
    """
    estimate(per_task_norms(model)[0], model, batches)


def estimate(norms: list[Any], model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the statistics of these batch norms of `model`; see `estimate_statistics`."""
    momenta = [norm.momentum for norm in norms]
    before = [{k: b.clone() for k, b in norm._buffers.items() if b is not None} for norm in norms]
    with evaluating(model):
        for norm in norms:
            _NormBase.reset_running_stats(norm)  # also that of the source, which keeps them
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


def plain_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch norm its own class back; those kept per task keep the target's state."""
    for norm in _batch_norms(model):
        if isinstance(norm, _PerTask):
            norm.momentum = cast(_NormBase, norm.source_norm).momentum
            del norm.source_norm
        take_off(norm)
    return model
