"""Switch a network between the source task and the target task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fast.heads.forward import unwrap


class Overlay:
    """Base of classes that are put in front of a module's own class, in place.

    `isinstance(module, its_class)` stays true, and the module can be copied and pickled.

    Attributes:
        plain_class: the module's own class.
    """

    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[1], self.plain_class), self.__dict__


_combinations: dict[tuple[type, type], Any] = {}


def _combined(overlay: type[Overlay], plain: type[nn.Module]) -> Any:
    """A class derived from `overlay` and `plain`, in that order."""
    if (overlay, plain) not in _combinations:
        name = f"{overlay.__name__.strip('_')}{plain.__name__}"
        _combinations[overlay, plain] = type(name, (overlay, plain), {"plain_class": plain})
    return _combinations[overlay, plain]


def _rebuild(overlay: type[Overlay], plain: type[nn.Module]) -> nn.Module:
    cls = _combined(overlay, plain)
    return cls.__new__(cls)


def put_over(module: nn.Module, overlay: type[Overlay]) -> None:
    """Put `overlay` in front of a module's class."""
    module.__class__ = _combined(overlay, type(module))


def take_off(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, Overlay):
        module.__class__ = module.plain_class  # type: ignore[assignment]


class TwoTask:
    """Mixin of modules that have parameters for both tasks.

    Attributes:
        answers_source: whether the module uses the source's parameters.
        frozen: parameters of the network that learn neither task because the module does.
    """

    answers_source: bool = False
    frozen: tuple[nn.Parameter, ...] = ()


def two_task_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, TwoTask)]


@contextmanager
def source_task(model: nn.Module) -> Iterator[nn.Module]:
    """Let the network answer the source task inside the block.

    It answers with its original head, with the source's batch norms if each task has its own, and
    without the target's adapters. The weights are the current ones, so this measures what the
    network still knows. Mode, gradients and buffers stay as they are. Parameters that were frozen
    because adapters learn require gradients inside the block, as they did before: torch sums some
    products of a frozen weight in another order. Contexts may be nested.

    Args:
        model: a network after `fast.replace_head`. A network with its own head answers its own
            task anyway.

    Yields:
        the same model.
    """
    modules = two_task_modules(model)
    before = [m.answers_source for m in modules]
    shared = {id(m.frozen): m.frozen for m in modules}
    frozen = [p for parameters in shared.values() for p in parameters if not p.requires_grad]
    for m in modules:
        m.answers_source = True
    for p in frozen:
        p.requires_grad_(True)
    heads = [m for m in modules if hasattr(m, "announce")]
    inner = unwrap(model)
    for head in heads:
        head.announce(inner)
    try:
        yield model
    finally:
        for m, state in zip(modules, before, strict=True):
            m.answers_source = state
        for p in frozen:
            p.requires_grad_(False)
        for head in heads:
            head.announce(inner)
