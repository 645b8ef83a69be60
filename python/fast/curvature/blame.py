"""Which module of a network cannot be differentiated twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fast.curvature.data import Batch
from fast.curvature.graph import nodes
from fast.curvature.network import Network

WAY_OUT = (
    "Use the plain torch form of that module, give its autograd.Function a backward that can be "
    "differentiated, or select with params= only parameters that come after it; "
    "fast.curvature.fisher_diagonal needs one derivative only"
)


class SecondDerivativeError(RuntimeError):
    """A part of the network cannot be differentiated twice; the message names it."""


def cut_off(tensors: list[Tensor | None]) -> bool:
    """Whether a once-differentiable function is in the graph of `tensors`.

    torch raises for those only when a path through them leads to the inputs asked for, and the
    path ends there: autograd.grad then leaves the term out and says nothing.
    """
    return any(node.name() == "torch::autograd::Error" for node in nodes(tensors))


def explain_failure(
    network: Network, batch: Batch, index: int, reason: str
) -> SecondDerivativeError:
    """An error that names the first module, innermost first, that fails on its own."""
    what = f"cannot be differentiated twice: {reason}"
    calls: list[tuple[str, nn.Module, Any, dict[str, Any]]] = []
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: calls.append((name, m, args, kwargs)),
            with_kwargs=True,
        )
        for name, module in network.model.named_modules()
    ]
    try:
        with network.scope(index, differentiable_twice=True):
            network.outputs(network.leaves(), batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    with network.scope(index, differentiable_twice=True):
        for name, module, args, kwargs in calls:
            if not _differentiable_twice(module, args, kwargs):
                where = f"module {name!r} ({type(module).__name__})"
                return SecondDerivativeError(f"{where} {what}. {WAY_OUT}")
    return SecondDerivativeError(f"the network or its loss {what}")


def _differentiable_twice(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().requires_grad_(t.is_floating_point())

    args, kwargs = pytree.tree_map(leaf, (tuple(args), kwargs))
    params = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    inputs = [t for t in inputs if t.requires_grad] + list(params.values())
    out = torch.func.functional_call(module, {**params, **buffers}, args, kwargs)
    total: Any = sum(
        (t * torch.rand_like(t)).square().sum()  # the cotangent has to depend on the output
        for t in pytree.tree_leaves(out)
        if isinstance(t, Tensor) and t.requires_grad
    )
    if not isinstance(total, Tensor) or not inputs:
        return True
    try:
        grads = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
        if cut_off(list(grads)):
            return False
        moving = [g for g in grads if g is not None and g.requires_grad]
        if moving:
            again: Any = sum(g.square().sum() for g in moving)
            torch.autograd.grad(again, inputs, allow_unused=True)
    except RuntimeError:
        return False
    return True
