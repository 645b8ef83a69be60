"""The model as a pure function of its parameters: evaluating it leaves no trace on the model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fast.curvature.losses.loss import Loss
from fast.curvature.network.batches import Batch
from fast.curvature.network.evaluation import evaluation
from fast.curvature.network.graph import graph_leaves
from fast.curvature.network.parameter_space import ParameterSpace
from fast.heads import class_axis, unwrap

Params = (
    None
    | str
    | nn.Module
    | Tensor
    | Iterable[str]
    | Iterable[Tensor]
    | Callable[[str, Tensor], bool]
)


class Network:
    """A model, the parameters that an operator differentiates by, and a scope to evaluate it in.

    Args:
        model: any module; a compiled or data-parallel one is evaluated as the original inside.
        params: None for all of `model.parameters()`; or names, tensors, a module of the model, a
            regular expression that a whole name must match, or a function (name, tensor) -> bool.
            Order and tying are those of `model.named_parameters()`.
        seed: seed of the random masks (dropout), which are the same at every evaluation of a batch.
    """

    def __init__(self, model: nn.Module, params: Params = None, seed: int = 0):
        self.model = unwrap(model)
        self.seed = seed
        self.everything = params is None
        every = dict(self.model.named_parameters())
        if frozen := [n for n, p in every.items() if p.is_inference()]:
            raise ValueError(
                f"parameter {frozen[0]!r} was made under torch.inference_mode, and cannot be "
                "differentiated by: make the model outside of it"
            )
        self.names = select(every, params)
        self.space = ParameterSpace({n: every[n] for n in self.names})
        self._head_dim: int | None = None
        self.uses_cudnn_rnn = self.space.device.type == "cuda" and any(
            isinstance(m, nn.RNNBase) for m in self.model.modules()
        )

    def leaves(self) -> dict[str, Tensor]:
        """Detached aliases of all parameters; the selected ones require a gradient."""
        names = set(self.names)
        return {n: p.detach().requires_grad_(n in names) for n, p in self.model.named_parameters()}

    def selected(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """The leaves that the operator differentiates by."""
        return [leaves[n] for n in self.names]

    def outputs(self, leaves: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """The model's output (its `logits`, for the output records of transformers)."""
        # Train-mode batch norm writes its running statistics: let it write into copies.
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        args, kwargs = _arguments(inputs)
        with _attributes_kept(self.model):
            out = functional_call(self.model, ({**leaves}, buffers), args, kwargs)
        if not isinstance(out, Tensor):
            logits = getattr(out, "logits", None)
            if logits is None and isinstance(out, Mapping):
                logits = out.get("logits")
            if not isinstance(logits, Tensor):
                raise TypeError(
                    f"{type(self.model).__name__} returned {type(out).__name__}; curvature needs "
                    "one tensor (or a record with .logits): wrap the model and pick the output"
                )
            out = logits
        return out

    def answers(self, leaves: Mapping[str, Tensor], batch: Batch, loss: Loss) -> tuple[Tensor, Any]:
        """Output and target of a batch, laid out as the loss wants them."""
        z = self.outputs(leaves, batch.inputs)
        return laid_out(z, batch.target, self.class_dim(z, batch, loss))

    def class_dim(self, z: Tensor, batch: Batch, loss: Loss) -> int:
        """The dimension of output z that has to become its dimension 1, for it holds the classes.

        Labels tell which it is. For a batch without labels, the network's head does.
        """
        if batch.target is None and loss.of_classes and self._head_dim is None:
            with self.scope(0, differentiable_twice=False), torch.no_grad():
                self._head_dim = class_axis.class_dim(self.model, z, batch.inputs)
        return loss.class_dim(z, batch.target, self._head_dim)

    @contextlib.contextmanager
    def scope(self, index: int, *, differentiable_twice: bool) -> Iterator[None]:
        """The state in which batch `index` is evaluated; see `evaluation`.

        Args:
            differentiable_twice: choose implementations that autograd can differentiate twice
                (attention by plain products, recurrent layers without cuDNN).
        """
        # One mask per (operator, batch): products are of one matrix, not of a random one.
        with evaluation(
            self.space.device,
            mask_seed(self.seed, index),
            differentiable_twice=differentiable_twice,
            cudnn=not self.uses_cudnn_rnn,
        ):
            yield

    def refuse_strays(self, output: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Raise where `output` depends on a parameter that is not reached through its module.

        Such a parameter cannot be replaced by a leaf: products would take it for a constant.
        """
        ids = {id(t) for t in leaves.values()}
        for leaf in graph_leaves([output]):
            if id(leaf) in ids:
                continue
            name = self.names_by_id().get(id(leaf))
            if name is not None and name in self.names:
                raise StrayParameter(name)
            if name is None and isinstance(leaf, nn.Parameter) and self.everything:
                raise StrayParameter(
                    f"{list(leaf.shape)}",
                    f"the model uses a parameter {list(leaf.shape)} that model.parameters() does "
                    "not list (kept in a plain list, perhaps): register it (nn.ParameterList, "
                    "nn.ModuleList), set its requires_grad to False, or say with params= which "
                    "parameters are meant",
                )

    def refuse_penalty(self, loss: Loss, z: Tensor, y: Any) -> None:
        """Raise where the loss of output z depends on a parameter in another way than by z."""
        if type(loss) is not Loss:  # those of torch read their arguments alone
            return
        with torch.enable_grad():
            value = loss.value(z.detach().requires_grad_(), y)
        for leaf in graph_leaves([value]):
            name = self.names_by_id().get(id(leaf))
            if name is not None and name in self.names:
                raise StrayParameter(
                    name,
                    f"loss_fn reads parameter {name!r} of the model, and products would leave that "
                    "out: take the loss of the output alone, and add the rest to the matrix (for "
                    "c |w|^2 it is 2 * c * fast.curvature.Identity(H.space))",
                )

    def names_by_id(self) -> dict[int, str]:
        """The names of the model's own parameters, by their ids."""
        return {id(p): n for n, p in self.model.named_parameters()}


def laid_out(z: Tensor, y: Any, dim: int) -> tuple[Tensor, Any]:
    """Output z and target y with dimension `dim` moved to dimension 1."""
    if dim == 1:
        return z, y
    soft = isinstance(y, Tensor) and y.ndim == z.ndim
    return z.movedim(dim, 1), y.movedim(dim, 1) if soft else y


def mask_seed(seed: int, index: int) -> int:
    """The seed of batch `index` of an operator with `seed`."""
    return seed * 1_000_003 + index


class StrayParameter(ValueError):
    """The model uses a parameter that no leaf can stand for; the message names it."""

    def __init__(self, name: str, message: str = ""):
        super().__init__(
            message
            or f"parameter {name!r} is also used past its module (through a plain list or another "
            "object that holds it): read it as an attribute of its module, or leave it out with "
            "params="
        )


def select(every: Mapping[str, Tensor], params: Params) -> tuple[str, ...]:
    """Names of the selected parameters, in the model's order."""
    if params is None:
        return tuple(every)
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    elif isinstance(params, Tensor):
        params = [params]
    if isinstance(params, str):
        try:
            pattern = re.compile(params)
        except re.error as error:
            raise ValueError(
                f"params={params!r} is no regular expression ({error}); for names as they are, "
                "pass a list of them"
            ) from error
        names = {n for n in every if pattern.fullmatch(n)}
        if not names:
            raise ValueError(
                f"params={params!r} matches no parameter name; names are {list(every)[:5]}, ..."
            )
    elif callable(params):
        names = {n for n, p in every.items() if params(n, p)}
    else:
        names = set()
        by_id = {id(p): n for n, p in every.items()}
        for item in params:
            name = item if isinstance(item, str) else by_id.get(id(item), "")
            if name not in every:
                what = repr(item) if isinstance(item, str) else f"a tensor {list(item.shape)}"
                raise ValueError(f"params has {what}, which is no parameter of the model")
            names.add(name)
    return tuple(n for n in every if n in names)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with: positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back tensors that are plain attributes: old-style weight norm writes its weight there."""
    before = [
        (vars(m), name, value)
        for m in model.modules()
        for name, value in vars(m).items()
        if isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for attributes, name, value in before:
            attributes[name] = value
