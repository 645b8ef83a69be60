"""What the anchored updates share: their rule, the arguments of one call, its way to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkernels import backends, op
from fastkernels.op import Backend

# The columns of csrc's Stat.
STATS = ("grad_norm", "drift", "update_norm", "forgetting")
# csrc's kMaxPull: a pull beyond it leaves nothing of w. It is finite so that a curvature of 0 can
# cancel it.
MAX_PULL = 1e30


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An update rule: the op's name, the columns of its hyper table, and the names of its lists of
    moments and of the scales of their codes. Moments in `optional_moments` may have 0 elements."""

    name: str
    columns: tuple[str, ...]
    moments: tuple[str, ...]
    scales: tuple[str, ...]
    optional_moments: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The lists whose tensors an update writes."""
        return ("params", *self.moments, "steps", *self.scales, "remainders")

    def scales_of(self, name: str) -> str:
        """The list of the scales of the 8-bit codes in the list `name`."""
        return dict(zip(self.moments, self.scales, strict=True)).get(name, "curvature_scales")


@dataclass(slots=True, kw_only=True)
class UpdateCall:
    """The arguments of one call: parallel lists over N tensors, as `anchored_adamw_` tells."""

    rule: Rule
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    moments: tuple[Sequence[Tensor], ...]
    moment_scales: tuple[Sequence[Tensor], ...]
    steps: Sequence[Tensor]
    hyper: Tensor
    groups: Sequence[int]
    anchors: Sequence[Tensor | None] = ()
    curvature: Sequence[Tensor | None] = ()
    curvature_scales: Sequence[Tensor | None] = ()
    remainders: Sequence[Tensor] = ()
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    stats: Tensor | None = None
    seed: int = 0

    def lists(self) -> dict[str, Sequence[Any]]:
        """Every list of tensors by its name."""
        return {
            "params": self.params, "grads": self.grads,
            **dict(zip(self.rule.moments, self.moments, strict=True)), "steps": self.steps,
            "anchors": self.anchors, "curvature": self.curvature,
            "curvature_scales": self.curvature_scales, "remainders": self.remainders,
            **dict(zip(self.rule.scales, self.moment_scales, strict=True)),
        }  # fmt: skip

    def outputs(self) -> list[Tensor]:
        """The tensors that the update writes, without `stats`."""
        lists = self.lists()
        return [t for key in self.rule.outputs for t in lists[key] if t.numel()]


# On an H200 the Triton kernels took 0.4 to 0.65 of the time of CUDA C++, before either was
# rewritten (docs/update.md); Triton needs no compiler.
BACKENDS = tuple(
    Backend(
        name=name,
        device=device,
        module=f"fastkernels.ops.update.{module}",
        function="run",
        available=available,
    )
    for name, device, module, available in (
        ("native", "cpu", "native", backends.native.available),
        ("triton", "cuda", "triton", backends.triton.available),
        ("native", "cuda", "cuda", backends.cuda.available),
        ("reference", "cpu", "reference", op.always),
        ("reference", "cuda", "reference", op.always),
        ("triton", "cpu", "triton", backends.triton.available_on_cpu),
    )
)


def fake(params: list[Tensor], grads: list[Tensor], *_: Any, **__: Any) -> None:
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        torch._check(
            p.shape == g.shape, lambda i=i: f"grads[{i}] has another shape than params[{i}]"
        )


_PLAIN = {Tensor, torch.nn.Parameter}


def direct(
    name: str, params: Sequence[Tensor] = (), grads: Sequence[Tensor] = (), *_: Any, **__: Any
) -> bool:
    """Whether a call can run without torch's dispatcher: eager, with plain tensors, and with no
    profiler or dispatch mode active.

    The dispatcher unpacks and packs every tensor of every list, which takes 6 ms for 2000 tensors.
    It is needed where a tensor is not plain memory: for wrappers (a gradient that is still being
    all-reduced), and for the negative views that autograd makes of complex numbers.

    Raises:
        ValueError: `params` or `grads` is not a list of tensors; the dispatcher's own error for
            this is pages long.
    """
    if torch.compiler.is_compiling():
        return False
    plain = True
    for key, tensors in (("params", params), ("grads", grads)):
        if not isinstance(tensors, (list, tuple)):
            raise ValueError(f"{name}: {key} must be a list; got {type(tensors).__name__}")
        if not set(map(type, tensors)) <= _PLAIN:
            plain = False
            for i, t in enumerate(tensors):
                if not isinstance(t, Tensor):
                    raise ValueError(f"{name}: {key}[{i}] must be a tensor; got {type(t).__name__}")
    return plain and not (
        torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
        or any(map(Tensor.is_neg, grads))
    )


@torch.no_grad()
def run(call: UpdateCall) -> None:
    """Make the cheap checks, and hand `call` to the backend of its device."""
    check_call(call)
    if call.params:
        op.choose(call.rule.name, call.params[0].device.type)(call)


def check_call(call: UpdateCall) -> None:
    """Raise a ValueError where an argument does not fit, apart from entries of lists.

    These checks are cheap, and are made at every call.
    """
    name, columns, hyper = call.rule.name, call.rule.columns, call.hyper
    lists = call.lists() | {"groups": call.groups}
    for key, entries in lists.items():
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"{name}: {key} must be a list; got {type(entries).__name__}")
    device = call.params[0].device if call.params else torch.device("cpu")
    table = f"float64 [groups, {len(columns)}] ({', '.join(columns)})"
    _check_array(f"{name}: hyper", hyper, table, None, len(columns))
    if hyper.device.type not in ("cpu", device.type):
        raise ValueError(f"{name}: hyper is on {hyper.device}, params[0] on {device}")
    rows, groups = hyper.shape[0], call.groups
    integers = set(map(type, groups)) <= {int}
    if not integers or (groups and not 0 <= min(groups) <= max(groups) < rows):
        wrong = next(i for i, g in enumerate(groups) if type(g) is not int or not 0 <= g < rows)
        raise ValueError(
            f"{name}: groups[{wrong}] must be an int that indexes the {rows} rows of hyper; got "
            f"{groups[wrong]!r}"
        )
    if call.stats is not None:
        _check_array(f"{name}: stats", call.stats, f"float64 [{len(STATS)}]", len(STATS))
        if call.stats.is_inference():
            raise ValueError(f"{name}: stats is an inference tensor, which may not be written to")
        if call.stats.device != device:
            raise ValueError(f"{name}: stats is on {call.stats.device}, params[0] on {device}")
    norm, seed = call.max_grad_norm, call.seed
    if norm is not None and (not _is_number(norm) or not norm > 0):
        raise ValueError(f"{name}: max_grad_norm must be None or a positive float; got {norm!r}")
    if not _is_number(seed) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{name}: seed must be an integer in [0, 2**63); got {seed!r}")
    for key, flag in (("grad_scale", call.grad_scale), ("found_inf", call.found_inf)):
        if flag is not None and (
            not isinstance(flag, Tensor) or flag.numel() != 1 or flag.is_complex()
        ):
            got = list(flag.shape) if isinstance(flag, Tensor) else repr(flag)
            raise ValueError(f"{name}: {key} must be None or a tensor of one number; got {got}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_array(what: str, t: Any, form: str, *shape: int | None) -> None:
    """Raise a ValueError unless `t` is a float64 array of `shape`, where None is any size."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{what} must be {form}; got {type(t).__name__}")
    fits = t.dim() == len(shape) and all(
        size in (None, n) for size, n in zip(shape, t.shape, strict=True)
    )
    if t.dtype != torch.float64 or not fits:
        raise ValueError(f"{what} must be {form}; got {t.dtype} {list(t.shape)}")
    if not t.is_contiguous() or t.is_neg() or (t.numel() and t.data_ptr() % t.element_size()):
        raise ValueError(f"{what} must be contiguous and aligned; give its .clone()")
