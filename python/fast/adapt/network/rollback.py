"""Restore the network where an adaptation fails to begin, or makes the head start worse."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fast import dtensor
from fast.adapt.network.drift import Drift
from fast.data.generators import process_generators, set_process_generators
from fast.heads import task_head

Buffers = list[tuple[nn.Module, str, Tensor]]


def _copied_buffers(model: nn.Module) -> Buffers:
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

    The model gets back its own head and batch norms, their statistics, its modes, and which of its
    parameters can be trained. It stays on its present device. A model whose weights have been
    sharded is left as it is: gathering them takes all ranks, and one of them may have failed.

    Args:
        weights: copy the weights as well, because the block may overwrite them (by a checkpoint).
    """

    def __init__(self, model: nn.Module, weights: bool = False) -> None:
        self.model = model
        self._parts = [(m, type(m), dict(m._modules), m.training) for m in model.modules()]
        self._trainable = [(p, p.requires_grad, p.dtype) for p in model.parameters()]
        copied = model.parameters() if weights else ()
        self._weights = [(p, p.detach().clone()) for p in copied]
        self._buffers = _copied_buffers(model)
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


class HeadStart:
    """The network before its first step: a pretrained backbone, and a head taught on its features.
    With few samples this can be better than anything that training reaches.

    Args:
        model: the network as it is before the first step.
        drift: holds the present weights of the backbone, so that only the head and the statistics
            need a copy.
    """

    def __init__(self, model: nn.Module, drift: Drift) -> None:
        self._drift = drift
        backbone = {id(p) for p in drift.params}
        self._weights = [
            (p, p.detach().clone())
            for p in model.parameters()
            if p.requires_grad and id(p) not in backbone
        ]
        self._buffers = _copied_buffers(model)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights and statistics back."""
        pairs = zip(self._drift.params, self._drift.anchors, strict=True)
        for now, before in (*pairs, *self._weights):
            now.copy_(before)
        for module, name, value in self._buffers:
            module._buffers[name] = value.clone()

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {str(i): value for i, (_, value) in enumerate(self._weights)},
            "buffers": {str(i): value for i, (*_, value) in enumerate(self._buffers)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, (_, value) in enumerate(self._weights):
            value.copy_(state["weights"][str(i)])
        for i, (*_, value) in enumerate(self._buffers):
            value.copy_(state["buffers"][str(i)])
