"""Switch a network between the source task and the target task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fast.heads.forward import unwrap


class TwoTask:
    """Mixin of modules that have parameters for both tasks.

    Attributes:
        answers_source: whether the source's are used.
    """

    answers_source: bool = False


def two_task_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, TwoTask)]


@contextmanager
def source_task(model: nn.Module) -> Iterator[nn.Module]:
    """Let the network answer the source task, with its original head and its batch norms per task.

    The weights are the current ones, so this measures what the network still knows. Mode, gradients
    and buffers stay as they are. Contexts may be nested.

    Args:
        model: a network after `fast.replace_head`. One with its own head answers its own task
            anyway.

    Yields:
        the same model.
    """
    modules = two_task_modules(model)
    before = [m.answers_source for m in modules]
    for m in modules:
        m.answers_source = True
    heads = [m for m in modules if hasattr(m, "announce")]
    inner = unwrap(model)
    for head in heads:
        head.announce(inner)
    try:
        yield model
    finally:
        for m, state in zip(modules, before, strict=True):
            m.answers_source = state
        for head in heads:
            head.announce(inner)
