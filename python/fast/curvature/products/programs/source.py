"""Write the code of a trace: one call after the other, each result freed after its last use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

    Args:
        passes: the segments that passes start with, in their order. Values of the segments before
            them are kept; those of a pass go after their use.
        compile: whether inductor compiles the segments that are not kept, when they first run.
    """

    def __init__(self, trace: Trace, passes: Sequence[int], *, compile: bool = False):
        self.compile, self.num_kept = compile, passes[0]
        self.same = merged(trace, passes)
        inputs = [v for given, _ in trace.segments for v in given]
        wanted = {self._first(v) for _, results in trace.segments for v in results}
        self.nodes = live(trace, wanted, self.same)
        self.constants: dict[str, Any] = {}
        self.names: dict[int, str] = {}
        home = {v: n for n, (given, _) in enumerate(trace.segments) for v in given}
        self.until: dict[int, int] = {}  # the last segment that reads a value
        for node in self.nodes:
            home |= {o: node.segment for o in node.made() if o not in home}
            self.until |= {self._first(v): node.segment for v in node.reads}
        crossing = {v for v, n in self.until.items() if v in home and home[v] != n}
        self.slots = {v: i for i, v in enumerate(sorted({*inputs, *wanted, *crossing}))}
        self.passing = {v for v in self.slots if home[v] >= self.num_kept}
        self.inputs = [[self.slots[v] for v in given] for given, _ in trace.segments]
        self.results = [[self.slot(v) for v in results] for _, results in trace.segments]
        for v in {self._first(v) for node in self.nodes for v in node.reads}:
            if (tensor := trace.values[v].constant) is not None:
                self.constants[f"v{v}"] = tensor
        self.code = [self._function(n) for n in range(len(trace.segments))]

    def slot(self, value: int) -> int:
        return self.slots[self._first(value)]

    def _first(self, value: int) -> int:
        return self.same.get(value, value)

    def _function(self, segment: int) -> Code:
        nodes = [n for n in self.nodes if n.segment == segment]
        last = {v: i for i, n in enumerate(nodes) for v in (*map(self._first, n.reads), *n.made())}
        gone: list[list[str]] = [[] for _ in nodes]
        for v, i in last.items():
            if f"v{v}" not in self.constants:
                gone[i].append(f"v{v}")
        lines: list[str] = []
        local: set[int] = set()
        for node, names in zip(nodes, gone, strict=True):
            reads = dict.fromkeys(map(self._first, node.reads))
            fetched = [v for v in reads if v in self.slots and v not in local]
            lines += [self._fetched(v, segment) for v in fetched]
            made = [o for o in node.made() if o not in local]
            local |= {*fetched, *made}
            lines.append(self._assigned(node, made) + self._call(node))
            lines += [f"e[{self.slots[o]}] = v{o}" for o in made if o in self.slots]
            if names:
                lines.append(f"{' = '.join(names)} = None")
        body = "\n    ".join(lines or ["pass"])
        scope = dict(self.constants)
        if self.compile:  # inductor looks at the gradient of what it is given, which has none
            scope = {n: c.detach() if isinstance(c, Tensor) else c for n, c in scope.items()}
        exec(f"def segment(e):\n    {body}\n", scope)
        code: Code = scope["segment"]
        if self.compile and segment >= self.num_kept:
            return torch.compile(code, fullgraph=True, dynamic=False)
        return code

    def _fetched(self, value: int, segment: int) -> str:
        slot = self.slots[value]
        over = value in self.passing and self.until[value] == segment
        return f"v{value} = e[{slot}]" + (f"; e[{slot}] = None" if over else "")

    def _assigned(self, node: Node, made: list[int]) -> str:
        """The left side of a call; what is written in place has its name already."""
        if not made:
            return ""
        names = [f"v{o}" if o in made else "_" for o in node.outputs]
        return f"{', '.join(names)}{',' if node.several else ''} = "

    def _call(self, node: Node) -> str:
        args = [self._text(a) for a in node.args]
        keywords = [f"{k}={self._text(a)}" for k, a in node.kwargs.items()]
        func, method = (node.func, False) if self.compile else direct(node)
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
    name, first = func._schema.name.removeprefix("aten::"), func._schema.arguments
    if func._overloadname.endswith("out") or not (node.args and isinstance(node.args[0], Ref)):
        return func, False
    method = vars(torch._C.TensorBase).get(name)
    if method is not None and first[0].name == "self" and getattr(Tensor, name) is method:
        return name, True
    return getattr(torch._C._VariableFunctions, name, func), False
