"""Switch a network between the source task and the target task.

The backward pass runs segments of `torch.utils.checkpoint` again, when the block that they ran in
has ended. They enter it once more then, and would compute another function otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from fast.heads.forward import unwrap


class Counted:
    """A setting of the whole process that lasts as long as any thread is inside.

    Without the count, threads that overlap would each put back what another one had set.
    """

    def __init__(self, enter: Callable[[], AbstractContextManager[Any]]):
        self.enter = enter
        self.lock = threading.Lock()
        self.inside = 0
        self.context: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.context = self.enter()
                self.context.__enter__()
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.context is not None:
                self.context.__exit__(None, None, None)
                self.context = None


class _Segments(threading.local):
    """What checkpointed segments do in a thread.

    Attributes:
        inline: blocks of `inline_segments` that it is inside of.
        again: contexts that a segment is in whenever it runs.
    """

    inline = 0
    again: tuple[Callable[[], AbstractContextManager[Any]], ...] = ()


_segments = _Segments()


def _in_contexts(function: Callable[..., Any]) -> Callable[..., Any]:
    """A segment that enters the contexts of this moment whenever it runs."""
    contexts = _segments.again
    if not contexts:
        return function

    def segment(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return function(*args, **kwargs)

    return segment


@contextmanager
def _own_segments() -> Iterator[None]:
    """Replace what runs segments in torch by what asks `_segments`."""
    reentrant = torch_checkpoint.CheckpointFunction
    generator = torch_checkpoint._checkpoint_without_reentrant_generator

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            if _segments.inline:
                return function(*args)
            return reentrant.apply(_in_contexts(function), preserve, *args)

    def without_reentrant(fn: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        if _segments.inline:
            yield
        else:
            yield from generator(_in_contexts(fn), *args, **kwargs)

    module: Any = torch_checkpoint
    module.CheckpointFunction = Reentrant
    module._checkpoint_without_reentrant_generator = without_reentrant
    try:
        yield
    finally:
        module.CheckpointFunction = reentrant
        module._checkpoint_without_reentrant_generator = generator


_OWN_SEGMENTS = Counted(_own_segments)


@contextmanager
def inline_segments() -> Iterator[None]:
    """Run checkpointed segments as plain code, in threads that are inside the block.

    A second derivative through a segment that the backward pass recomputes either fails
    (reentrant) or recomputes it once per vector, while the graph is kept for all vectors anyway.
    """
    with _OWN_SEGMENTS:
        _segments.inline += 1
        try:
            yield
        finally:
            _segments.inline -= 1


@contextmanager
def also_again(context: Callable[..., AbstractContextManager[Any]], *args: Any) -> Iterator[Any]:
    """Enter `context(*args)`, in which the backward pass runs checkpointed segments again, too."""
    before = _segments.again
    with _OWN_SEGMENTS, context(*args) as value:
        _segments.again = (*before, partial(also_again, context, *args))
        try:
            yield value
        finally:
            _segments.again = before


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


def source_task(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Let the network answer the source task inside the block.

    It answers with its original head, with the source's batch norms if each task has its own, and
    without the target's adapters. The weights are the current ones, so this measures what the
    network still knows. Mode, gradients and buffers stay as they are. Parameters that were frozen
    because adapters learn require gradients inside the block, as they did before: torch sums some
    products of a frozen weight in another order. Contexts may be nested. A backward pass after the
    block differentiates what ran inside, checkpointed segments (`torch.utils.checkpoint`) too.

    Args:
        model: a network after `fast.replace_head`. A network with its own head answers its own
            task anyway.

    Returns:
        a context, which gives the same model.
    """
    return also_again(_answering_source, model)


@contextmanager
def _answering_source(model: nn.Module) -> Iterator[nn.Module]:
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
