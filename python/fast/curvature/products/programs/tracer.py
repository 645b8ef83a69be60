"""Write down every operation of a computation, so that it can run again without the code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten


class Ref(NamedTuple):
    """The place of a tensor among the arguments of a recorded operation."""

    value: int


@dataclass(kw_only=True)
class Value:
    """One tensor of the computation.

    Attributes:
        memory: the first value in the same memory: views of one tensor share it.
        layout: offset, shape and strides in this memory, and how its bits are read.
        constant: the tensor itself, where it is a number that the code wrote down.
        given: whether it is an input.
    """

    memory: int
    layout: tuple[Any, ...]
    constant: Tensor | None = None
    given: bool = False

    @property
    def is_made(self) -> bool:
        return not self.given and self.constant is None


@dataclass(kw_only=True)
class Node:
    """One operation: the values that it reads and makes, and the memory that it overwrites.

    An output that is no tensor is None.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    reads: list[int]
    outputs: list[int | None]
    several: bool  # whether it gives a tuple
    writes: set[int]
    segment: int
    # It has to run, whether anything depends on it or not: it draws random numbers, or checks.
    required: bool

    def made(self) -> list[int]:
        return [o for o in self.outputs if o is not None]


@dataclass(kw_only=True)
class Trace:
    """The nodes in their order, the values that they read and make, and for every segment the
    inputs that it is given and its results.
    """

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    segments: list[tuple[list[int], list[int]]] = field(default_factory=list)


class Diverged(Exception):
    """A number that steers the network's code is another one than when it was traced."""


def expect(func: Callable[..., Any], args: tuple[Any, ...], number: Any) -> None:
    """Read a number from data again, and raise `Diverged` if it is another one."""
    if func(*args) != number:
        raise Diverged


class Tracer(TorchDispatchMode):
    """Records the operations inside `segment`, below autograd and below other modes.

    A number that is read from data is recorded with its value: where it comes out otherwise, the
    code might take another turn. `why` says why the trace is of no use, where it is not.

    Args:
        others: inputs of the first segment that its code does not name.
        fixed: whether tensors that are no inputs keep their values, as those of a kept record do.
    """

    def __init__(self, others: Sequence[Tensor] = (), *, fixed: bool = False) -> None:
        super().__init__()
        self.others, self.fixed = others, fixed
        self.trace = Trace()
        self.why = ""
        self._known = WeakTensorKeyDictionary()
        # Views by memory, offset, shape, strides and type: the same view is taken only once.
        self._windows: dict[Any, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Recorder`

    @contextmanager
    def segment(self, *inputs: Tensor) -> Iterator[Callable[..., None]]:
        """Record what is computed inside from `inputs`; yields what takes the results."""
        given = [self._give(t) for t in inputs]
        if not self.trace.segments:
            given += map(self._give, self.others)
        results: list[int] = []
        self.trace.segments.append((given, results))
        with self:
            yield lambda *tensors: results.extend(map(self.index, tensors))

    def start_pass(self) -> int:
        """The number of the first segment of a pass, which finds no views of other passes."""
        self._windows.clear()
        return len(self.trace.segments)

    def refuse(self, why: str) -> None:
        self.why = self.why or why

    def _give(self, tensor: Tensor) -> int:
        index = self._new(tensor, None)
        self.trace.values[index].given = True
        return index

    def index(self, tensor: Tensor) -> int:
        """The number of a tensor; one that was never seen is a constant."""
        index: int | None = self._known.get(tensor)
        if index is None:
            index = self._new(tensor, None)
            self.trace.values[index].constant = tensor
            if not self.fixed:
                self.refuse(
                    "it uses a tensor that is no parameter, buffer, attribute or input of it"
                )
        return index

    def _new(self, tensor: Tensor, memory: int | None) -> int:
        index = len(self.trace.values)
        memory = index if memory is None else memory
        self.trace.values.append(Value(memory=memory, layout=_layout(tensor)))
        self._known[tensor] = index
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
        seen = [(t, self.index(t), _address(t)) for t in _tensors((args, kwargs))]
        described = self._described(args), self._described(kwargs)
        out = func(*args, **kwargs)
        self._note(func, described, seen, args, kwargs, out)
        return out

    def _literal(self, tensor: Tensor) -> Tensor:
        """A copy, for the code may write to it."""
        index = self._new(tensor, None)
        self.trace.values[index].constant = tensor
        out = tensor.clone()
        self._add(aten.clone.default, (Ref(index),), {}, [index], [self._new(out, None)])
        return out

    def _described(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return Ref(self._known[tree])
        if isinstance(tree, tuple | list):
            return tuple(map(self._described, tree))
        if isinstance(tree, dict):
            return {k: self._described(v) for k, v in tree.items()}
        return tree

    def _note(self, func: Any, described: Any, seen: Any, args: Any, kwargs: Any, out: Any) -> None:
        traits = _traits(func)
        if traits.dynamic and not _static(func, args):
            self.refuse(f"the shape of what {func} gives depends on data")
            return
        outs = list(out) if isinstance(out, tuple | list) else [out]
        if not any(isinstance(o, Tensor) for o in outs):
            if seen and traits.reads_data:
                self._expect(func, described[0], [i for _, i, _ in seen], out)
            return
        written = _tensors([args[i] if i < len(args) else kwargs.get(n) for i, n in traits.writes])
        writes = {self.trace.values[self._known[t]].memory for t in written}
        known = len(self.trace.values)
        outputs = [self._output(o, seen) if isinstance(o, Tensor) else None for o in outs]
        fresh = [o for o in outputs if o is not None and o >= known]
        if not writes and not fresh:
            return  # a view that was taken before
        if not writes and self._are_views_of_constants(outs, fresh):
            return
        if not writes and all(self._is_window(o) for o in fresh):
            for o in fresh:
                value = self.trace.values[o]
                offset, shape, stride = value.layout[:3]
                strided = (Ref(value.memory), tuple(shape), stride, offset)
                self._add(aten.as_strided.default, strided, {}, [value.memory], [o])
            return
        self._add(
            func,
            described[0],
            described[1],
            [i for _, i, _ in seen],
            outputs,
            several=isinstance(out, tuple | list),
            writes=writes,
            required=traits.random,
        )

    def _add(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        reads: list[int],
        outputs: list[int | None],
        *,
        required: bool = False,
        several: bool = False,
        writes: Iterable[int] = (),
    ) -> None:
        node = Node(
            func=func,
            args=args,
            kwargs=kwargs,
            reads=reads,
            outputs=outputs,
            several=several,
            writes=set(writes),
            segment=len(self.trace.segments) - 1,
            required=required,
        )
        self.trace.nodes.append(node)

    def _are_views_of_constants(self, outs: list[Any], fresh: list[int]) -> bool:
        """Whether all results are views of constants, and so constants themselves."""
        owners = [self.trace.values[self.trace.values[o].memory] for o in fresh]
        if any(owner.constant is None for owner in owners):
            return False
        for tensor in outs:
            self.trace.values[self._known[tensor]].constant = tensor
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

    def _output(self, tensor: Tensor, seen: list[tuple[Tensor, int, int]]) -> int:
        known: int | None = self._known.get(tensor)
        if known is not None:
            return known
        address = _address(tensor)
        source = next((i for _, i, a in seen if a == address and a), None)
        memory = None if source is None else self.trace.values[source].memory
        window = memory, _layout(tensor)
        if memory is not None and window in self._windows:
            self._known[tensor] = self._windows[window]
            return self._windows[window]
        index = self._new(tensor, memory)
        self._windows[self.trace.values[index].memory, _layout(tensor)] = index
        return index


class Reads(TorchFunctionMode):
    """Notices where data leave torch in ways that no operation shows."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        copies = func in _ENTERING and next(_tensors((args, kwargs)), None) is not None
        if func in _LEAVING or copies:
            self.tracer.refuse(f"it reads data by {getattr(func, '__name__', func)}")
        return func(*args, **kwargs)


_LEAVING = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.__repr__,
    Tensor.__format__,
    Tensor.__reduce_ex__,
    Tensor.__deepcopy__,
}
_ENTERING = {torch.tensor, torch.as_tensor, torch.asarray}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


class Traits(NamedTuple):
    """What an operation does besides computing: its schema and tags say so.

    Attributes:
        writes: place and name of the arguments that it overwrites.
    """

    dynamic: bool
    reads_data: bool
    random: bool
    writes: list[tuple[int, str]]


@functools.cache
def _traits(func: Any) -> Traits:
    places = enumerate(func._schema.arguments)
    written = [(i, s) for i, s in places if s.alias_info is not None and s.alias_info.is_write]
    return Traits(
        dynamic=torch.Tag.dynamic_output_shape in func.tags,
        reads_data=torch.Tag.data_dependent_output in func.tags,
        random=torch.Tag.nondeterministic_seeded in func.tags,
        writes=[(i, spec.name) for i, spec in written],
    )


@functools.cache
def output_mask(func: Any) -> int | None:
    """The place of the argument that says which results an operation computes."""
    arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else []
    return next((i for i, spec in enumerate(arguments) if spec.name == "output_mask"), None)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else 0


def _layout(t: Tensor) -> Any:
    return t.storage_offset(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()


def _static(func: Any, args: Any) -> bool:
    """Whether an operation that may give results of any shape does not, with these arguments."""
    if func is not aten.index.Tensor:
        return False
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])
