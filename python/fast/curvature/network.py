"""The model as a pure function of its parameters: evaluating it leaves no trace on the model."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as torch_checkpoint

from fast.curvature.memory import reuse_freed_pages
from fast.curvature.space import ParameterSpace

Params = None | str | Iterable[str] | Iterable[Tensor] | Callable[[str, Tensor], bool]


class Network:
    """A model, the parameters that an operator differentiates by, and a scope to evaluate it in.

    Args:
        model: any module; of a compiled or data-parallel one, the original is evaluated.
        params: None for all of `model.parameters()`; or names, tensors, a regular expression that a
            whole name must match, or a function (name, tensor) -> bool. Order and tying are those
            of `model.named_parameters()`.
        seed: of the random masks (dropout), the same at every evaluation of the same batch.
    """

    def __init__(self, model: nn.Module, params: Params = None, seed: int = 0):
        self.model = unwrap(model)
        self.seed = seed
        every = dict(self.model.named_parameters())
        self.names = select(every, params)
        self.space = ParameterSpace({n: every[n] for n in self.names})
        if self.space.device.type == "cpu":
            reuse_freed_pages()
        self.uses_cudnn_rnn = self.space.device.type == "cuda" and any(
            isinstance(m, nn.RNNBase) for m in self.model.modules()
        )

    def leaves(self) -> dict[str, Tensor]:
        """Detached aliases of all parameters; those selected require a gradient."""
        chosen = set(self.names)
        return {n: p.detach().requires_grad_(n in chosen) for n, p in self.model.named_parameters()}

    def selected(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        return [leaves[n] for n in self.names]

    def outputs(self, leaves: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """The model's output (its `logits`, for the output records of transformers)."""
        # Train-mode batch norm writes its running statistics: let it write into copies.
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        args, kwargs = _arguments(inputs)
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

    @contextlib.contextmanager
    def scope(self, index: int, *, differentiable_twice: bool) -> Iterator[None]:
        """Evaluate batch `index` in here: random state restored, compiled code and shortcuts off.

        `differentiable_twice`: choose implementations that autograd can differentiate twice
        (attention by plain products, recurrent layers without cuDNN); else the user's own.
        """
        device = self.space.device
        with contextlib.ExitStack() as stack:
            cuda = [device] if device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            # One mask per (operator, batch): products are of one matrix, not of a random one.
            torch.manual_seed(mask_seed(self.seed, index))
            stack.enter_context(torch.enable_grad())
            if "torch._dynamo" in sys.modules:  # else nothing is compiled; it weighs 128 MiB
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_no_mha_fastpath())
            stack.enter_context(_checkpoint_inline())
            if differentiable_twice:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if self.uses_cudnn_rnn:
                    stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def state(self) -> tuple[Any, ...]:
        """Changes when the function changes: modes, and versions and values of parameters.

        Values, not versions alone: kernels that write through raw pointers bump no version.
        """
        params = [p.detach() for p in self.model.parameters()]
        norms = torch.stack(torch._foreach_norm(params)).tolist() if params else []
        modes = tuple(m.training for m in self.model.modules())
        return (modes, tuple(p._version for p in params), tuple(norms))


def mask_seed(seed: int, index: int) -> int:
    """Random state that batch `index` of an operator with `seed` is evaluated in."""
    return seed * 1_000_003 + index


def unwrap(model: nn.Module) -> nn.Module:
    """The module under torch.compile, DataParallel and DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def select(every: Mapping[str, Tensor], params: Params) -> tuple[str, ...]:
    """Names of the selected parameters, in the model's order."""
    if params is None:
        return tuple(every)
    if isinstance(params, str):
        pattern = re.compile(params)
        chosen = {n for n in every if pattern.fullmatch(n)}
        if not chosen:
            raise ValueError(
                f"params={params!r} matches no parameter name; names are {list(every)[:5]}, ..."
            )
    elif callable(params):
        chosen = {n for n, p in every.items() if params(n, p)}
    else:
        chosen = set()
        by_id = {id(p): n for n, p in every.items()}
        for item in params:
            name = item if isinstance(item, str) else by_id.get(id(item), "")
            if name not in every:
                what = repr(item) if isinstance(item, str) else f"a tensor {list(item.shape)}"
                raise ValueError(f"params has {what}, which is no parameter of the model")
            chosen.add(name)
    return tuple(n for n in every if n in chosen)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


@contextlib.contextmanager
def _no_mha_fastpath() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _InlineCheckpoint:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


@contextlib.contextmanager
def _checkpoint_inline() -> Iterator[None]:
    """Run checkpointed segments as plain code.

    A second derivative through a segment that is recomputed in the backward pass either fails
    (reentrant) or is recomputed once per vector; the graph is kept for all vectors anyway.
    """

    def inline(fn: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    names = {
        "CheckpointFunction": _InlineCheckpoint,
        "_checkpoint_without_reentrant_generator": inline,
    }
    before = {n: getattr(torch_checkpoint, n) for n in names}
    for n, value in names.items():
        setattr(torch_checkpoint, n, value)
    try:
        yield
    finally:
        for n, value in before.items():
            setattr(torch_checkpoint, n, value)


_DETACHING = (
    Tensor.detach,
    Tensor.detach_,
    torch.detach,
    vars(torch._C.TensorBase)["data"].__get__,
)


class _StopGradients(TorchFunctionMode):
    def __init__(self, stopped: Callable[[Tensor], object]):
        super().__init__()
        self.stopped = stopped

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _DETACHING:
            self.stopped(out)
        return out


def stop_gradients(stopped: Callable[[Tensor], object]) -> TorchFunctionMode:
    """Tell `stopped` of every tensor that the model's own code detaches.

    Below autograd, such a detach looks the same as the ones that autograd makes for itself.
    """
    return _StopGradients(stopped)
