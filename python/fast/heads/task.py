"""Which task a network answers: modules that know two tasks, and the switch between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fast.heads.forward import unwrap


class TwoTask:
    """Mixin of modules that can answer the source task in place of the target task."""

    answers_source: bool = False


def two_task_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, TwoTask)]


@contextmanager
def source_task(model: nn.Module) -> Iterator[nn.Module]:
    """Let the network answer the source task: its original head, and batch norms kept per task.

    The weights are the current ones, so what is measured inside is what the network still knows.
    Mode, gradients and buffers are left as they are. May be nested.

    Args:
        model: a network whose head was replaced by `fast.replace_head`; a network that still has
            its own head answers its own task anyway.

    Yields:
        the same model.
    """
    modules = two_task_modules(model)
    before = [m.answers_source for m in modules]
    for m in modules:
        m.answers_source = True
    labels = [m for m in modules if hasattr(m, "announce")]
    inner = unwrap(model)
    for m in labels:
        m.announce(inner)
    try:
        yield model
    finally:
        for m, state in zip(modules, before, strict=True):
            m.answers_source = state
        for m in labels:
            m.announce(inner)
