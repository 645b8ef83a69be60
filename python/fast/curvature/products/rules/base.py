"""The registry of rules, and the record of a call that a rule gets.

A rule looks at one call at the recorded point and returns its derivative: a function of one tangent
per positional argument (None where the argument does not depend on the parameters, a list for a
list) that returns the tangents of the outputs. A tangent has the shape of its tensor with K in
front; its memory may lie in another order (convolutions prefer K after the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

aten, prims = torch.ops.aten, torch.ops.prims
# One tangent, [K, *shape], or None for an argument that does not depend on the parameters.
Tangent = Any
Rule = Callable[["Call"], Callable[..., Any]]
RULES: dict[Any, Rule] = {}
# The operations whose results move with their first argument alone.
BY_FIRST: set[Any] = set()


class UnsupportedOperation(Exception):
    """An operation that the record cannot hold; the message names it."""


class RuleError(RuntimeError):
    """A rule or its derivative failed; the message names the operation."""

    @classmethod
    def of(cls, operation: Any, error: Exception) -> RuleError:
        return cls(f"in the rule of {operation}, {type(error).__name__}: {error}")


# A rule may raise these without being at fault.
NO_FAULT = (UnsupportedOperation, torch.OutOfMemoryError)


@dataclass(kw_only=True)
class Call:
    """One call of an operation, as its rule sees it.

    Attributes:
        func, args, kwargs, out: the operation, its arguments, and what it gave.
        active: for each argument, whether it depends on the parameters.
        versions: where `keep` notes the values that derivatives read.
        cache: where `shared` keeps what two calls have in common.
        exact: whether the backward pass reads values of the forward pass that depend on the
            parameters, as that of a Hessian does.
        differentiable_outputs: the places of the outputs that depend on the parameters; None means
            all. The rule may set it.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    active: tuple[bool, ...]
    versions: list[tuple[Tensor, int, str]]
    cache: dict[Any, tuple[Any, tuple[Tensor, ...]]]
    exact: bool
    differentiable_outputs: tuple[int, ...] | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """A value that the derivative reads; the record checks that nobody overwrites it."""
        self.versions.append((tensor, tensor._version, str(self.func)))
        return tensor

    def shared(self, name: Any, tensors: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """make(), computed once for the forward and the backward call on the same values.

        Args:
            name: everything that make() reads besides the tensors: two calls on one tensor may have
                different masks, scales or epsilons.
        """
        key = (name, *((t.data_ptr(), t.shape, t.stride(), t.dtype, t._version) for t in tensors))
        if key not in self.cache:
            # The entry holds the tensors, so that no other tensor can get their address.
            self.cache[key] = (make(), tensors)
        return self.cache[key][0]

    def constant(self) -> Callable[..., Any]:
        """The derivative of a call whose results do not depend on the parameters."""
        self.differentiable_outputs = ()
        nothing = (None,) * len(self.out) if isinstance(self.out, tuple | list) else None
        return lambda *_: nothing

    def is_active(self, i: int) -> bool:
        """Whether argument i is there, and depends on the parameters."""
        return i < len(self.active) and self.active[i]

    def arg(self, i: int, default: Any = None) -> Any:
        """Argument i, or its default where the call leaves it out."""
        return self.args[i] if i < len(self.args) else default


def rule(*funcs: Any, by_first: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for some operations.

    Args:
        by_first: the results move with the first argument alone: the derivative takes its tangent,
            and where it is fixed, the results are constants.
    """

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(funcs, f))
        BY_FIRST.update(funcs if by_first else ())
        return f

    return register


# Their decompositions choose another side at a kink (0) than autograd does.
OTHER_SIDE = {
    aten.elu.default,
    aten.elu_backward.default,
    aten._prelu_kernel.default,
    aten._prelu_kernel_backward.default,
}


def decomposition(func: Any) -> Callable[..., Any] | None:
    """torch's decomposition of `func` into simpler operations, where there is one.

    What only calls other operations (`aten.softmax.int`, `aten.to.dtype`) is taken apart before
    autograd sees it; inside another decomposition it is not, and comes here.
    """
    if func in OTHER_SIDE:
        return None
    table: dict[Any, Callable[..., Any]] = decomposition_table
    return table.get(func) or (func.decompose if func._can_decompose() else None)


def spread(d: Tensor, ndim: int, target_ndim: int) -> Tensor:
    """A tangent [K, *shape] as [K, 1, ..., *shape], so that it broadcasts as its tensor does.

    Args:
        ndim: number of dimensions of `shape`.
        target_ndim: number of dimensions of the result, without K.
    """
    if ndim == target_ndim:
        return d
    return d.reshape(d.shape[0], *([1] * (target_ndim - ndim)), *d.shape[1:])


def dims_of(dim: Any, ndim: int) -> list[int]:
    """Non-negative dimensions from an int, a list or None (all)."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [d % ndim if ndim else 0 for d in dims]


def batch_inner(d: Tensor) -> Tensor:
    """A tangent [K, B, ...] as [B, K, ...], which is contiguous."""
    return d.transpose(0, 1).contiguous()
