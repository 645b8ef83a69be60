"""The tracer writes down every operation of a computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fast.curvature.products.programs.trace import Node, Ref, Trace, Value, expect
from fast.curvature.products.programs.traits import is_dynamic, written_by

aten = torch.ops.aten
# The tensors among an operation's arguments: each with its number and the address of its memory.
Arguments = list[tuple[Tensor, int, int]]


class Tracer(TorchDispatchMode):
    """Records the operations inside `segment`, below autograd and below other modes.

    A number that is read from data is recorded with its value: where it comes out otherwise, the
    code might take another turn.

    Args:
        others: inputs of the first segment that its code does not name.
        only_constants: whether all tensors that are no inputs are constants, as those of a cached
            record are.

    Attributes:
        trace: the operations so far.
        why: why the trace is of no use; empty where it is of use.
    """

    def __init__(self, others: Sequence[Tensor] = (), *, only_constants: bool = False) -> None:
        super().__init__()
        self.others, self.only_constants = others, only_constants
        self.trace = Trace()
        self.why = ""
        self._numbers = WeakTensorKeyDictionary()
        # Views by memory, offset, shape, strides and type: the same view is taken only once.
        self._windows: dict[Any, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Recorder`

    @contextmanager
    def segment(self, *inputs: Tensor) -> Iterator[Callable[..., None]]:
        """Record what is computed inside from `inputs`; yields what takes the results."""
        arguments = [self._give(t) for t in inputs]
        if not self.trace.segments:
            arguments += map(self._give, self.others)
        results: list[int] = []
        self.trace.segments.append((arguments, results))
        with self:
            yield lambda *tensors: results.extend(map(self.index, tensors))

    def start_pass(self) -> int:
        """The number of the first segment of a pass, which finds no views of other passes."""
        self._windows.clear()
        return len(self.trace.segments)

    def refuse(self, why: str) -> None:
        """Give the trace up; the first reason stays."""
        self.why = self.why or why

    def _give(self, tensor: Tensor) -> int:
        """The number of a tensor that is an input from here on."""
        index = self._new(tensor, None)
        self.trace.values[index].is_input = True
        return index

    def index(self, tensor: Tensor) -> int:
        """The number of a tensor; one that was never seen is a constant."""
        index: int | None = self._numbers.get(tensor)
        if index is None:
            index = self._new(tensor, None)
            self.trace.values[index].constant = tensor
            if not self.only_constants:
                self.refuse(
                    "the network uses a tensor that is no parameter, buffer, attribute or input"
                )
        return index

    def _new(self, tensor: Tensor, memory: int | None) -> int:
        """A new number for a tensor; it has memory of its own where `memory` is None."""
        index = len(self.trace.values)
        memory = index if memory is None else memory
        self.trace.values.append(Value(memory=memory, layout=_layout(tensor)))
        self._numbers[tensor] = index
        return index

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.why:
            return func(*args, **kwargs)
        if func is aten.lift_fresh.default:  # a number that the code wrote down
            return self._literal(args[0])
        # Arguments are looked up first: an operation may resize or write to them.
        tensors = [(t, self.index(t), _address(t)) for t in _tensors((args, kwargs))]
        references = self._described(args), self._described(kwargs)
        out = func(*args, **kwargs)
        self._note(func, references, tensors, args, kwargs, out)
        return out

    def _literal(self, tensor: Tensor) -> Tensor:
        """A number that the code wrote down; a copy, for the code may write to it."""
        index = self._new(tensor, None)
        self.trace.values[index].constant = tensor
        out = tensor.clone()
        self._add(aten.clone.default, (Ref(index),), {}, [index], [self._new(out, None)])
        return out

    def _described(self, tree: Any) -> Any:
        """Arguments with references in place of tensors."""
        if isinstance(tree, Tensor):
            return Ref(self._numbers[tree])
        if isinstance(tree, tuple | list):
            return tuple(map(self._described, tree))
        if isinstance(tree, dict):
            return {k: self._described(v) for k, v in tree.items()}
        return tree

    def _note(
        self, func: Any, references: Any, tensors: Arguments, args: Any, kwargs: Any, out: Any
    ) -> None:
        """Add a call that has been made, unless it only gives what is in the trace already.

        Args:
            references: the arguments and keywords, with references in place of tensors.
        """
        if is_dynamic(func, args):
            self.refuse(f"the shape of what {func} gives depends on data")
            return
        reads = [i for _, i, _ in tensors]
        outs = list(out) if isinstance(out, tuple | list) else [out]
        if not any(isinstance(o, Tensor) for o in outs):
            if tensors and torch.Tag.data_dependent_output in func.tags:
                self._expect(func, references[0], reads, out)
            return
        targets = _tensors(
            [args[i] if i < len(args) else kwargs.get(n) for i, n in written_by(func)]
        )
        writes = {self.trace.values[self._numbers[t]].memory for t in targets}
        count = len(self.trace.values)
        outputs = [self._output(o, tensors) if isinstance(o, Tensor) else None for o in outs]
        new = [o for o in outputs if o is not None and o >= count]
        if not writes and self._are_views(outs, new):
            return
        self._add(
            func,
            references[0],
            references[1],
            reads,
            outputs,
            several=isinstance(out, tuple | list),
            writes=writes,
            required=torch.Tag.nondeterministic_seeded in func.tags,
        )

    def _are_views(self, outs: list[Any], new: list[int]) -> bool:
        """Whether the results are views, which are noted in a way of their own.

        A view that was taken before needs no note, one of a constant is a constant itself, and one
        of a value that was made here is taken from the whole of this value.

        Args:
            new: the numbers of the results that are not in the trace yet.
        """
        if not new or self._are_views_of_constants(outs, new):
            return True
        if not all(map(self._is_window, new)):
            return False
        for o in new:
            value = self.trace.values[o]
            offset, shape, stride = value.layout[:3]
            arguments = (Ref(value.memory), tuple(shape), stride, offset)
            self._add(aten.as_strided.default, arguments, {}, [value.memory], [o])
        return True

    def _add(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        reads: list[int],
        outputs: list[int | None],
        **traits: Any,
    ) -> None:
        """Add an operation to the trace.

        Args:
            traits: the other attributes of its `Node`.
        """
        node = Node(
            func=func,
            args=args,
            kwargs=kwargs,
            reads=reads,
            outputs=outputs,
            segment=len(self.trace.segments) - 1,
            **traits,
        )
        self.trace.nodes.append(node)

    def _are_views_of_constants(self, outs: list[Any], new: list[int]) -> bool:
        """Whether all results are views of constants, and so constants themselves."""
        owners = [self.trace.values[self.trace.values[o].memory] for o in new]
        if any(owner.constant is None for owner in owners):
            return False
        for tensor in outs:
            self.trace.values[self._numbers[tensor]].constant = tensor
        return True

    def _is_window(self, index: int) -> bool:
        """Whether a value is a view of something that was made here, all of it known."""
        value = self.trace.values[index]
        owner = self.trace.values[value.memory]
        return value is not owner and owner.is_made and owner.layout[3:] == value.layout[3:]

    def _expect(self, func: Any, args: Any, reads: list[int], number: Any) -> None:
        """Note that code may take another turn where data give another number."""
        if isinstance(number, bool | int | float):
            self._add(expect, (func, args, number), {}, reads, [], required=True)
        else:
            self.refuse(f"{func} reads data")

    def _output(self, tensor: Tensor, tensors: Arguments) -> int:
        """The number of a result; the same one for the same view of the same memory."""
        number: int | None = self._numbers.get(tensor)
        if number is not None:
            return number
        address = _address(tensor)
        owner = next((i for _, i, a in tensors if a == address and a), None)
        memory = None if owner is None else self.trace.values[owner].memory
        window = memory, _layout(tensor)
        if memory is not None and window in self._windows:
            self._numbers[tensor] = self._windows[window]
            return self._windows[window]
        index = self._new(tensor, memory)
        self._windows[self.trace.values[index].memory, _layout(tensor)] = index
        return index


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else 0


def _layout(t: Tensor) -> Any:
    return t.storage_offset(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()
