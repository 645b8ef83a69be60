"""Find the module of a network that cannot be differentiated twice, or not to finite numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fast.curvature.network.batches import Batch
from fast.curvature.network.graph import SecondDerivativeError, cut_off
from fast.curvature.network.network import Network

WAY_OUT = (
    "Use the plain torch form of that module, give its autograd.Function a backward that can be "
    "differentiated, or select with params= only parameters that come after it; fast.GGN, "
    "fast.Fisher and fast.curvature.fisher_diagonal need one derivative only"
)
AWAY = (
    "Keep its input away from points without a derivative (such as zero for a square root or a "
    "norm), or select with params= only parameters that come after it"
)


def explain_failure(
    network: Network, batch: Batch, index: int, reason: str
) -> SecondDerivativeError:
    """An error that names the first module, innermost first, that fails on its own."""
    call = _first_call(network, batch, index, _differentiable_twice)
    what = f"cannot be differentiated twice: {reason.rstrip('.')}"
    if call is None:
        return SecondDerivativeError(f"the network or its loss {what}")
    return SecondDerivativeError(f"{call.described} {what}. {WAY_OUT}")


def explain_not_finite(
    network: Network, batch: Batch, index: int, again: Callable[[], object]
) -> Exception | None:
    """An error that names the operation which makes products with finite vectors not finite.

    None where the products of this batch are finite.

    Args:
        again: computes the products once more, by autograd alone.
    """
    operation = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the anomaly mode warns about itself
        try:
            with torch.autograd.detect_anomaly():
                again()
        except RuntimeError as error:
            match = re.search(r"Function '(\w+?)(Backward\d*)?' returned nan", str(error))
            operation = match[1] if match else ""
    if not operation:
        return None
    where = "the network or its loss"
    if (call := _first_call(network, batch, index, _finite_twice)) is not None:
        where = call.described
        operation = _operation(call) or operation
    return SecondDerivativeError(
        f"{where} has a derivative that is not finite: {operation} gives NaN at finite inputs. "
        f"{AWAY}"
    )


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """One call of a module or of a function of torch, with its arguments."""

    name: str
    function: Callable[..., Any]
    args: Any
    kwargs: Any

    @property
    def described(self) -> str:
        return f"module {self.name!r} ({type(self.function).__name__})"


class _Calls(TorchFunctionMode):
    """Records the functions of torch that are called with floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Invocation] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = args, kwargs or {}
        leaves = pytree.tree_leaves(arguments)
        if any(isinstance(t, Tensor) and t.is_floating_point() for t in leaves):
            args, kwargs = _copied(arguments)
            name = getattr(func, "__name__", str(func))
            self.calls.append(Invocation(name=name, function=func, args=args, kwargs=kwargs))
        return func(*args, **(kwargs or {}))


def _operation(call: Invocation) -> str:
    """The name of the first function inside a call that has no finite derivatives at its inputs."""
    with _Calls() as functions, torch.no_grad():
        call.function(*_copied(call.args), **_copied(call.kwargs))
    return next((c.name for c in functions.calls if not _finite_twice(c)), "")


def _first_call(
    network: Network, batch: Batch, index: int, passes: Callable[[Invocation], bool]
) -> Invocation | None:
    """The first call of a module, innermost first, for which `passes` is false."""
    calls = calls_of(network, batch, index)
    with network.scope(index, differentiable_twice=True):
        return next((call for call in calls if not passes(call)), None)


def calls_of(network: Network, batch: Batch, index: int) -> list[Invocation]:
    """The calls of all modules with their arguments, innermost first."""
    calls: list[Invocation] = []
    pending: list[tuple[Any, Any]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        pending.append(_copied((args, kwargs)))

    def after(name: str, module: nn.Module) -> None:
        args, kwargs = pending.pop()
        calls.append(Invocation(name=name, function=module, args=args, kwargs=kwargs))

    handles = []
    for name, module in network.model.named_modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda m, args, out, name=name: after(name, m)))
    try:
        with network.scope(index, differentiable_twice=True):
            network.outputs(network.leaves(), batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def _differentiable_twice(call: Invocation) -> bool:
    """Whether torch can differentiate a call twice."""
    try:
        _second_derivatives(call)
    except RuntimeError:
        return False
    return True


def _finite_twice(call: Invocation) -> bool:
    """Whether both derivatives of a call are finite."""
    try:
        derivatives = _second_derivatives(call)
    except (RuntimeError, TypeError):
        return True  # it fails in another way, or is no function of tensors
    return all(bool(t.isfinite().all()) for t in derivatives)


def _second_derivatives(call: Invocation) -> list[Tensor]:
    """The gradients of a call at its inputs, and the derivatives of a function of them.

    Raises:
        RuntimeError: an operation has no second derivative.
    """
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().requires_grad_())
        return leaves[-1].clone()  # the module may write to it

    args, kwargs = pytree.tree_map_only(Tensor, leaf, (tuple(call.args), call.kwargs))
    if isinstance(call.function, nn.Module):
        params = {n: p.detach().requires_grad_() for n, p in call.function.named_parameters()}
        buffers = {n: b.clone() for n, b in call.function.named_buffers()}
        leaves += params.values()
        out = torch.func.functional_call(call.function, {**params, **buffers}, args, kwargs)
    else:
        out = call.function(*args, **kwargs)
    outs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not outs or not leaves:
        return []
    # The cotangent has to depend on the output: hence squares, at random weights.
    total = torch.stack([(t * torch.rand_like(t)).square().sum() for t in outs]).sum()
    grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    if cut_off(list(grads)):
        raise SecondDerivativeError("once_differentiable")
    moving = [g for g in grads if g is not None and g.requires_grad]
    if not moving:
        return []
    again = torch.stack([g.square().sum() for g in moving]).sum()
    second = torch.autograd.grad(again, leaves, allow_unused=True)
    return [t for t in (*moving, *second) if t is not None]
