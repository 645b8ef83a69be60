"""The state in which a network is evaluated: settings, random numbers and exact operations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fast.heads.task import Counted, inline_segments


@contextlib.contextmanager
def _no_mha_fastpath() -> Iterator[None]:
    """Keep torch's encoder layers from the inference kernels that have no derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


MHA = Counted(_no_mha_fastpath)
ATTENTION = Counted(lambda: sdpa_kernel(SDPBackend.MATH))
EAGER = Counted(lambda: torch.compiler.set_stance("force_eager"))
CUDNN = Counted(lambda: torch.backends.cudnn.flags(enabled=False))


@contextlib.contextmanager
def evaluation(
    device: torch.device, seed: int, *, differentiable_twice: bool, cudnn: bool = True
) -> Iterator[None]:
    """Turn gradients on, compiled code and shortcuts off, and seed; put all of it back afterwards.

    Args:
        differentiable_twice: compute attention by plain products, and recurrent layers without
            cuDNN where `cudnn` is false.
    """
    with contextlib.ExitStack() as stack:
        cuda = device.type == "cuda"
        stack.enter_context(torch.random.fork_rng(devices=[device] if cuda else []))
        # torch.manual_seed would also seed all other devices, which fork_rng does not put back.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # 128 MiB; where it is not loaded, nothing is compiled
            stack.enter_context(EAGER)
        stack.enter_context(MHA)
        stack.enter_context(inline_segments())
        if differentiable_twice:
            stack.enter_context(ATTENTION)
            if not cudnn:
                stack.enter_context(CUDNN)
        stack.enter_context(ExactForms())
        yield


class ExactForms(TorchFunctionMode):
    """Replaces operations that change the model, or whose derivatives are wrong in torch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (exact := _EXACT.get(func)) is not None:
            return exact(*args, **kwargs)
        if func is F.embedding or func is F.embedding_bag:
            kwargs = _plain_embedding(func, args, kwargs)
            args = ()
        return func(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """v g / |v|; torch's own second derivative is wrong on the CPU (torch 2.13)."""
    dims = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


def _logaddexp(input: Tensor, other: Tensor) -> Tensor:
    """log(e^a + e^b); torch's own second derivative is NaN where b - a is large."""
    return input - F.logsigmoid(input - other)


def _logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """log of the cumulative sum of e^x, by doubling steps.

    torch's own second derivative takes logarithms of the first, which may be negative.
    """
    length, step = input.shape[dim] if input.ndim else 1, 1
    while step < length:
        start, rest = input.narrow(dim, 0, step), length - step
        input = torch.cat(
            [start, _logaddexp(input.narrow(dim, step, rest), input.narrow(dim, 0, rest))], dim
        )
        step *= 2
    return input


_EXACT: dict[Any, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    torch.logaddexp: _logaddexp,
    Tensor.logaddexp: _logaddexp,
    torch.logcumsumexp: _logcumsumexp,
    Tensor.logcumsumexp: _logcumsumexp,
}

_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
              "sparse")  # fmt: skip
_BAG = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode",
        "sparse", "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip


def _plain_embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an embedding, changed so that it writes nothing and has dense gradients."""
    names = _EMBEDDING if func is F.embedding else _BAG
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    if arguments.get("scale_grad_by_freq"):
        raise ValueError(
            "an embedding of model has scale_grad_by_freq=True: what its backward pass gives is no "
            "gradient of the loss, and has no symmetric derivative; set it to False"
        )
    limit, weight = arguments.pop("max_norm", None), arguments["weight"]
    if limit is not None:
        rows = weight.detach()[arguments["input"].reshape(-1)]
        norms = torch.linalg.vector_norm(rows, arguments.get("norm_type", 2.0), dim=-1)
        # torch rescales rows to the limit within rounding.
        slack = 1 + 16 * torch.finfo(weight.dtype).eps
        if bool((norms > limit * slack).any()):
            raise ValueError(
                f"an embedding of model has max_norm={limit} and rows that are longer: evaluating "
                "it would rescale them. Run model(inputs) once, which does, or set max_norm=None"
            )
    return {**arguments, "sparse": False}


_DETACHING = (
    Tensor.detach,
    Tensor.detach_,
    torch.detach,
    vars(torch._C.TensorBase)["data"].__get__,
)


class StopGradients(TorchFunctionMode):
    """Tells `on_detach` of every tensor that the model's own code detaches.

    Below autograd, such a detach looks the same as the ones that autograd makes for itself.
    """

    def __init__(self, on_detach: Callable[[Tensor], object]):
        super().__init__()
        self.on_detach = on_detach

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _DETACHING:
            self.on_detach(out)
        return out
