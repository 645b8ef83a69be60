"""Write the code of a trace: one call after the other, each result freed after its last use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fast.curvature.products.programs.simplify import live, merged
from fast.curvature.products.programs.tracer import Node, Ref, Trace

# A function over the values that are shared between segments, by their slot.
Code = Callable[[list[Any]], None]


class Source:
    """The functions of all segments of a trace, which share values by slots.

    The caller puts inputs into their slots, and finds results in theirs.
    """

    def __init__(self, trace: Trace):
        self.same = merged(trace)
        inputs = [v for given, _ in trace.segments for v in given]
        wanted = {self._first(v) for _, results in trace.segments for v in results}
        self.nodes = live(trace, wanted, self.same)
        self.constants: dict[str, Any] = {}
        self.names: dict[int, str] = {}
        slots = self._crossing({*inputs, *wanted})
        self.slots = {v: i for i, v in enumerate(sorted(slots))}
        self.inputs = [[self.slots[v] for v in given] for given, _ in trace.segments]
        self.results = [[self.slot(v) for v in results] for _, results in trace.segments]
        for v in {self._first(v) for node in self.nodes for v in node.reads()}:
            if (tensor := trace.values[v].constant) is not None:
                self.constants[f"v{v}"] = tensor
        self.code = [self._function(n) for n in range(len(trace.segments))]

    def slot(self, value: int) -> int:
        return self.slots[self._first(value)]

    def _first(self, value: int) -> int:
        return self.same.get(value, value)

    def _crossing(self, shared: set[int]) -> set[int]:
        """The values that are made in one segment and read in another."""
        home: dict[int, int] = {}
        for node in self.nodes:
            for v in map(self._first, node.reads()):
                if v in home and home[v] != node.segment:
                    shared.add(v)
            for o in node.outputs:
                if o is not None:
                    home.setdefault(o, node.segment)
        return shared

    def _function(self, segment: int) -> Code:
        nodes = [n for n in self.nodes if n.segment == segment]
        last: dict[int, int] = {}
        for i, node in enumerate(nodes):
            for v in (*map(self._first, node.reads()), *(o for o in node.outputs if o is not None)):
                last[v] = i
        lines, local = [], set()
        for i, node in enumerate(nodes):
            for v in map(self._first, node.reads()):
                if v not in local and v in self.slots:
                    lines.append(f"v{v} = e[{self.slots[v]}]")
                    local.add(v)
            names = []
            for o in node.outputs:
                names.append("_" if o is None or o in local else f"v{o}")
                if o is not None:
                    local.add(o)
            call = self._call(node)
            if names and (node.several or names != ["_"]):
                call = f"{', '.join(names)}{',' if node.several else ''} = {call}"
            lines.append(call)
            lines += [
                f"e[{self.slots[o]}] = v{o}"
                for o, name in zip(node.outputs, names, strict=True)
                if o in self.slots and name != "_"
            ]
            gone = [f"v{v}" for v, when in last.items() if when == i and v in local]
            if "_" in names:
                gone.append("_")
            if gone:
                lines.append(f"{' = '.join(gone)} = None")
        body = "\n    ".join(lines or ["pass"])
        scope = dict(self.constants)
        exec(compile(f"def segment(e):\n    {body}\n", f"<program {segment}>", "exec"), scope)
        return scope["segment"]  # type: ignore[no-any-return]

    def _call(self, node: Node) -> str:
        args = [self._text(a) for a in node.args]
        keywords = [f"{k}={self._text(a)}" for k, a in node.kwargs.items()]
        func, method = direct(node)
        if method:
            return f"{args[0]}.{func}({', '.join(args[1:] + keywords)})"
        return f"{self._constant(func)}({', '.join(args + keywords)})"

    def _text(self, arg: Any) -> str:
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
        if id(thing) not in self.names:
            self.names[id(thing)] = f"c{len(self.names)}"
            self.constants[self.names[id(thing)]] = thing
        return self.names[id(thing)]


def direct(node: Node) -> tuple[Any, bool]:
    """What does the same as an operation in half the time: a method's name, or a function.

    torch generates both from the operation's schema, and takes the same arguments.
    """
    func = node.func
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return func, False
    name, first = func._schema.name.removeprefix("aten::"), func._schema.arguments[:1]
    if func._overloadname.endswith("out") or not (node.args and isinstance(node.args[0], Ref)):
        return func, False
    if first and first[0].name == "self" and name in vars(torch._C.TensorBase):
        if getattr(Tensor, name) is vars(torch._C.TensorBase)[name]:
            return name, True
    return getattr(torch._C._VariableFunctions, name, func), False
