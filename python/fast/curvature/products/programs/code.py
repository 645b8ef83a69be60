"""Write the code of a trace: one call after the other, each result freed after its last use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fast.curvature.products.programs.simplify import live, merged
from fast.curvature.products.programs.trace import Node, Ref, Trace

# A function of the values that segments share, by their number: it reads some, and writes others.
SegmentFunction = Callable[[list[Any]], None]


class Code:
    """The functions of all segments of a trace, which share values by their numbers in the trace.

    The caller puts the inputs there, and finds the results.

    Args:
        passes: the segments that passes start with, in their order. Values of the segments before
            them are kept; those of a pass go after their use.
        compile: whether inductor compiles the segments of passes, when they first run.

    Attributes:
        functions: one per segment.
        inputs, results: the values that each segment is given, and those that it results in.
        passing: the shared values that do not outlive a pass.
    """

    def __init__(self, trace: Trace, passes: Sequence[int], *, compile: bool = False):
        self.compile, self.first_pass = compile, passes[0]
        self._same = merged(trace, passes)
        self.inputs = [arguments for arguments, _ in trace.segments]
        self.results = [list(map(self._first, results)) for _, results in trace.segments]
        needed_by_caller = {*chain.from_iterable(self.results)}
        self._nodes = live(trace, needed_by_caller, self._same)
        home = {v: n for n, arguments in enumerate(self.inputs) for v in arguments}
        self._last_reader: dict[int, int] = {}  # the last segment that reads a value
        for node in self._nodes:
            home |= {o: node.segment for o in node.made() if o not in home}
            self._last_reader |= {self._first(v): node.segment for v in node.reads}
        crossing = {v for v, n in self._last_reader.items() if v in home and home[v] != n}
        self._shared = {*chain.from_iterable(self.inputs), *needed_by_caller, *crossing}
        self.passing = {v for v in self._shared if home[v] >= self.first_pass}
        self.num_values = len(trace.values)
        # What the code names besides values: functions, dtypes, and the tensors that never change.
        self._constants: dict[str, Any] = {}
        self._constant_names: dict[int, str] = {}
        for v in {self._first(v) for node in self._nodes for v in node.reads}:
            if (tensor := trace.values[v].constant) is not None:
                self._constants[f"v{v}"] = tensor
        self.functions = [self._function(n) for n in range(len(trace.segments))]

    def _first(self, value: int) -> int:
        """The value that stands for this one: the first that is computed in the same way."""
        return self._same.get(value, value)

    def _function(self, segment: int) -> SegmentFunction:
        body = "\n    ".join(self._lines(segment) or ["pass"])
        scope = dict(self._constants)
        if self.compile:  # inductor looks at the gradient of what it is given, which has none
            scope = {n: c.detach() if isinstance(c, Tensor) else c for n, c in scope.items()}
        exec(f"def segment(e):\n    {body}\n", scope)
        function: SegmentFunction = scope["segment"]
        if self.compile and segment >= self.first_pass:
            return torch.compile(function, fullgraph=True, dynamic=False)
        return function

    def _lines(self, segment: int) -> list[str]:
        """The lines of a segment's function, in which `e` holds the shared values."""
        nodes = [n for n in self._nodes if n.segment == segment]
        last = {v: i for i, n in enumerate(nodes) for v in (*map(self._first, n.reads), *n.made())}
        last_uses: list[list[str]] = [[] for _ in nodes]
        for v, i in last.items():
            if f"v{v}" not in self._constants:
                last_uses[i].append(f"v{v}")
        lines: list[str] = []
        local: set[int] = set()
        for node, names in zip(nodes, last_uses, strict=True):
            reads = dict.fromkeys(map(self._first, node.reads))
            fetched = [v for v in reads if v in self._shared and v not in local]
            lines += [self._fetched(v, segment) for v in fetched]
            new = [o for o in node.made() if o not in local]
            local |= {*fetched, *new}
            lines.append(self._assigned(node, new) + self._call(node))
            lines += [f"e[{o}] = v{o}" for o in new if o in self._shared]
            if names:
                lines.append(f"{' = '.join(names)} = None")
        return lines

    def _fetched(self, value: int, segment: int) -> str:
        """The line that reads a shared value, which is let go where nobody reads it later."""
        over = value in self.passing and self._last_reader[value] == segment
        return f"v{value} = e[{value}]" + (f"; e[{value}] = None" if over else "")

    def _assigned(self, node: Node, new: list[int]) -> str:
        """The left side of a call; what is written in place has its name already."""
        if not new:
            return ""
        names = [f"v{o}" if o in new else "_" for o in node.outputs]
        return f"{', '.join(names)}{',' if node.several else ''} = "

    def _call(self, node: Node) -> str:
        args = [self._text(a) for a in node.args]
        keywords = [f"{k}={self._text(a)}" for k, a in node.kwargs.items()]
        func, method = (node.func, False) if self.compile else direct(node)
        if method:
            return f"{args[0]}.{func}({', '.join(args[1:] + keywords)})"
        return f"{self._constant(func)}({', '.join(args + keywords)})"

    def _text(self, arg: Any) -> str:
        """An argument as code."""
        if isinstance(arg, Ref):
            return f"v{self._first(arg.value)}"
        if isinstance(arg, tuple | list):
            inner = ", ".join(map(self._text, arg))
            return f"({inner},)" if len(arg) == 1 else f"({inner})"
        if arg is None or isinstance(arg, bool | int | str):
            return repr(arg)
        if isinstance(arg, float) and math.isfinite(arg):
            return repr(arg)
        return self._constant(arg)

    def _constant(self, thing: Any) -> str:
        """The name by which the code reaches an object."""
        if id(thing) not in self._constant_names:
            self._constant_names[id(thing)] = f"c{len(self._constant_names)}"
            self._constants[self._constant_names[id(thing)]] = thing
        return self._constant_names[id(thing)]


def direct(node: Node) -> tuple[Any, bool]:
    """What does the same as an operation in half the time: a method's name, or a function.

    torch generates both from the operation's schema, and takes the same arguments.

    Returns:
        a name and True for a method, a function and False for others.
    """
    func = node.func
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return func, False
    name, first = func._schema.name.removeprefix("aten::"), func._schema.arguments
    if func._overloadname.endswith("out") or not (node.args and isinstance(node.args[0], Ref)):
        return func, False
    method = vars(torch._C.TensorBase).get(name)
    if method is not None and first[0].name == "self" and getattr(Tensor, name) is method:
        return name, True
    return getattr(torch._C._VariableFunctions, name, func), False
