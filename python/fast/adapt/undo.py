"""A network as it was before a run: for a run that fails before its first step."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from fast.heads import task_head


class Untouched:
    """Puts a model back as it was, unless its first step was taken.

    A context: when its block ends in an exception before `keep` was called, the model has its own
    head and batch norms again, their statistics, its modes and what of it can be trained. Only the
    device stays.

    Args:
        model: before the run.
        weights: they may be overwritten before the first step (by a checkpoint), so copy them too.
    """

    def __init__(self, model: nn.Module, weights: bool) -> None:
        self.model = model
        self._parts = [(m, type(m), dict(m._modules), m.training) for m in model.modules()]
        self._trainable = [(p, p.requires_grad, p.dtype) for p in model.parameters()]
        copied = model.parameters() if weights else ()
        self._weights = [(p, p.detach().clone()) for p in copied]
        # By name: moving a module to a device makes new buffers, and keeps its parameters.
        self._buffers: list[tuple[nn.Module, str, Tensor]] = [
            (m, name, b.clone())
            for m in model.modules()
            for name, b in m._buffers.items()
            if b is not None
        ]
        self._head = task_head(model)
        self.kept = False

    def keep(self) -> None:
        """From now on the model is the run's; forgets what it was."""
        self.kept = True
        self._weights, self._buffers = [], []

    def __enter__(self) -> Untouched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self.kept:
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        head = task_head(self.model)
        if head is not None and head is not self._head:
            head.answers_source = True
            head.announce(self.model)
        for module, kind, children, training in self._parts:
            module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for parameter, trainable, dtype in self._trainable:
            parameter.requires_grad_(trainable)
            if parameter.dtype != dtype:  # 16-bit weights, made wider and not yet changed
                parameter.data = parameter.data.to(dtype)
        for parameter, value in self._weights:
            parameter.copy_(value)
        for module, name, value in self._buffers:
            module._buffers[name] = module._buffers[name].to(value.dtype).copy_(value)  # type: ignore[union-attr]
