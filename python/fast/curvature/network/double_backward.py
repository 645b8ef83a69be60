"""Which module of a network cannot be differentiated twice, or has no finite derivatives."""

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
    "Keep its input away from where it has none (as of a square root or a norm at zero), or select "
    "with params= only parameters that come after it"
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
    """Why a product of finite vectors is not finite; None where that of this batch is.

    Args:
        again: computes it once more, by autograd alone.
    """
    operation = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the anomaly mode, about itself
        try:
            with torch.autograd.detect_anomaly():
                again()
        except RuntimeError as error:
            found = re.search(r"Function '(\w+?)(Backward\d*)?' returned nan", str(error))
            operation = found[1] if found else ""
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


@dataclass(frozen=True)
class Call:
    """A module or function of torch, and what it was called with."""

    name: str
    function: Callable[..., Any]
    args: Any
    kwargs: Any

    @property
    def described(self) -> str:
        return f"module {self.name!r} ({type(self.function).__name__})"


class _Calls(TorchFunctionMode):
    """Notes the functions of torch that are called with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = args, kwargs or {}
        if any(isinstance(t, Tensor) and t.is_floating_point() for t in pytree.tree_leaves(given)):
            self.found.append(Call(getattr(func, "__name__", str(func)), func, *_kept(given)))
        return func(*args, **(kwargs or {}))


def _operation(call: Call) -> str:
    """The first function inside a call that has no finite derivatives at the inputs it gets."""
    with _Calls() as calls, torch.no_grad():
        call.function(*_kept(call.args), **_kept(call.kwargs))
    return next((c.name for c in calls.found if not _finite_twice(c)), "")


def _first_call(
    network: Network, batch: Batch, index: int, passes: Callable[[Call], bool]
) -> Call | None:
    """The first call of a module, innermost first, that does not pass."""
    calls: list[Call] = []
    pending: list[tuple[Any, Any]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        pending.append(_kept((args, kwargs)))

    def after(name: str, module: nn.Module) -> None:
        calls.append(Call(name, module, *pending.pop()))

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
    with network.scope(index, differentiable_twice=True):
        return next((call for call in calls if not passes(call)), None)


def _kept(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def _differentiable_twice(call: Call) -> bool:
    try:
        _second_derivatives(call)
    except RuntimeError:
        return False
    return True


def _finite_twice(call: Call) -> bool:
    try:
        found = _second_derivatives(call)
    except (RuntimeError, TypeError):
        return True  # it fails in another way, or is no function of tensors
    return all(bool(t.isfinite().all()) for t in found)


def _second_derivatives(call: Call) -> list[Tensor]:
    """Derivatives of a function of a call's gradients, and these.

    Raises:
        RuntimeError: an operation has none.
    """
    leaves: list[Tensor] = []

    def given(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().requires_grad_())
        return leaves[-1].clone()  # which the module may write to

    args, kwargs = pytree.tree_map_only(Tensor, given, (tuple(call.args), call.kwargs))
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
    # The cotangent has to depend on the output.
    total = torch.stack([(t * torch.rand_like(t)).square().sum() for t in outs]).sum()
    grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    if cut_off(list(grads)):
        raise SecondDerivativeError("once_differentiable")
    moving = [g for g in grads if g is not None and g.requires_grad]
    if not moving:
        return []
    again = torch.stack([g.square().sum() for g in moving]).sum()
    found = torch.autograd.grad(again, leaves, allow_unused=True)
    return [t for t in (*moving, *found) if t is not None]
