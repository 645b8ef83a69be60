"""Restore the network where an adaptation fails to begin."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from fast import dtensor
from fast.adapt.network.noise import dropout_shares, set_dropout
from fast.data.generators import process_generators, set_process_generators
from fast.heads import norm_momenta, task_head

Buffers = list[tuple[nn.Module, str, Tensor]]


def copied_buffers(model: nn.Module) -> Buffers:
    """Copies of the buffers, by name: a module may put another tensor in a buffer's place."""
    return [
        (m, name, b.clone())
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]


class RollbackOnError:
    """Restores a model, and the process's random generators, if the block ends in an exception
    before `keep` is called.

    The model gets back its own head and batch norms, their statistics, its modes, its dropout, and
    which of its parameters can be trained. It stays on its present device. A model whose weights
    have been sharded is left as it is: gathering them takes all ranks, and one of them may have
    failed.

    Args:
        weights: copy the weights as well, because the block may overwrite them (by a checkpoint).
    """

    def __init__(self, model: nn.Module, weights: bool = False) -> None:
        self.model = model
        self._parts = [(m, type(m), dict(m._modules), m.training) for m in model.modules()]
        hooks = (h for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks))
        self._hooks = [(h, dict(h)) for h in hooks]
        self._trainable = [(p, p.requires_grad, p.dtype) for p in model.parameters()]
        copied = model.parameters() if weights else ()
        self._weights = [(p, p.detach().clone()) for p in copied]
        self._buffers = copied_buffers(model)
        self._dropout, self._momenta = dropout_shares(model), norm_momenta(model)
        self._head = task_head(model)
        self._generators = process_generators()
        self.kept = False

    def keep(self) -> None:
        """Keep the model as it is from now on, and drop the copies."""
        self.kept = True
        self._weights, self._buffers = [], []

    def __enter__(self) -> RollbackOnError:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self.kept:
            return
        set_process_generators(self._generators)
        if not dtensor.any_sharded(list(self.model.parameters())):
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        head = task_head(self.model)
        if head is not None and head is not self._head:
            head.answers_source = True
            head.announce(self.model)
        for hooks, before in self._hooks:  # a head that is kept has been watched
            hooks.clear()
            hooks.update(before)
        for module, kind, children, training in self._parts:
            module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        set_dropout(self._dropout, 1.0)
        for norm, momentum in self._momenta:
            norm.momentum = momentum
        for parameter, trainable, dtype in self._trainable:
            parameter.requires_grad_(trainable)
            if parameter.dtype != dtype:  # 16-bit weights, made wider and not yet changed
                parameter.data = parameter.data.to(dtype)
        for parameter, value in self._weights:
            parameter.copy_(value)
        for module, name, value in self._buffers:
            module._buffers[name] = module.get_buffer(name).to(value.dtype).copy_(value)
