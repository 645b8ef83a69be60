"""Second derivatives of a network's modules: torch's own, ours, and what differences say.

torch has operations whose second derivatives are wrong in silence, or missing
(pytorch/pytorch#198017). Which of them a network meets depends on its modules, on their modes and
on the version of torch; the audit compares them at the inputs that each module really gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp
from torch.utils import _pytree as pytree

from fast.curvature.network.batches import Batch, Batches
from fast.curvature.network.double_backward import calls_of
from fast.curvature.network.network import Network
from fast.curvature.operators.hessian import Hessian
from fast.curvature.operators.self_check import in_float64
from fast.errors import first_line

# A derivative of a derivative by differences has about half the digits of float64.
EXACT = 1e-5
# Differences of a smooth function at two distances agree to this share of the largest.
SMOOTH = 1e-6
# A direction that leaves more kinks than this behind is no direction to compare along.
ROUNDS = 4
WAYS = ("double_backward", "forward_over_reverse", "nested_forward", "ours")


@dataclass(frozen=True, kw_only=True)
class Audited:
    """The second derivatives of one module, along a random direction.

    Attributes:
        double_backward, forward_over_reverse, nested_forward, ours: "exact", "wrong by E" (relative
            to the difference of first derivatives), "refused: ..." (an error of ours), "fails: ..."
            (an error of torch) or "kink".
    """

    name: str
    kind: str
    double_backward: str
    forward_over_reverse: str
    nested_forward: str
    ours: str

    @property
    def torch_is_wrong(self) -> bool:
        torch_ways = (self.double_backward, self.forward_over_reverse, self.nested_forward)
        return any(w.startswith("wrong") for w in torch_ways)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `audit` found; `print` shows it as a table."""

    rows: tuple[Audited, ...]
    torch: str = torch.__version__

    @property
    def ok(self) -> bool:
        """Whether products of ours are exact, or refused, for every module."""
        return not any(r.ours.startswith("wrong") for r in self.rows)

    @property
    def wrong(self) -> list[str]:
        """Names of the modules where torch's own second derivative is wrong."""
        return [r.name for r in self.rows if r.torch_is_wrong]

    def __str__(self) -> str:
        head = ("module", "double backward", "jvp(jacrev)", "jvp(jvp)", "fast")
        lines = [f"torch {self.torch}", "", _line(head), _line("---" for _ in head)]
        lines += [
            _line([f"{r.name} ({r.kind})", *(getattr(r, w) for w in WAYS)]) for r in self.rows
        ]
        return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def audit(model: nn.Module, inputs: Any, *, seed: int = 0) -> Audit:
    """Compare the second derivatives of a network's modules in float64.

    Each module without parts (and each with parameters of its own) is taken with the inputs that it
    gets in `model(*inputs)`. Its derivative is that of a weighted sum of its squared outputs, in
    its parameters and inputs together, along a random direction v: `H v` by torch's double
    backward, by its forward mode over `jacrev` (as in `torch.func.hessian`) and by `fast.Hessian`,
    and `v H v` by its forward mode twice. The truth is the central difference of torch's first
    derivative. Where that has a kink nearby (a ReLU's input close to 0), v does not move; a module
    where most of v would not is told as a kink. Differences move what a module detaches (spectral
    norm in train mode), and the row `padding_idx`: there double backward and ours, for which these
    are constants, are told as wrong.

    Args:
        model: any module; it is copied, and evaluated in the modes that its parts are in.
        inputs: a tensor, a tuple (`model(*inputs)`) or a dict (`model(**inputs)`).
        seed: seed of the direction, and of dropout.

    Raises:
        ValueError: the network fails at these inputs in float64.
    """
    model, batches = in_float64(model, Batches([Batch(inputs, None)], labels=None))
    network, batch = Network(model, None, seed), next(iter(batches))
    try:
        calls = calls_of(network, batch, 0)
    except RuntimeError as error:
        raise ValueError(
            f"the network fails at these inputs in float64 ({first_line(error)}); if it casts to a "
            "type of its own, audit the parts that do not"
        ) from error
    rows = []
    for call in calls:
        module = call.function
        assert isinstance(module, nn.Module)
        if any(True for _ in module.children()) and not any(True for _ in module.parameters(False)):
            continue
        rows.append(audit_module(call.name or "(the model)", module, call.args, call.kwargs, seed))
    return Audit(rows=tuple(rows))


def audit_module(
    name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], seed: int = 0
) -> Audited:
    """Compare the second derivatives of one module, in float64.

    Args:
        args, kwargs: what it is called with.
    """
    function = _Lifted(module, args, kwargs)
    kind = type(module).__name__
    if not function.points:
        return Audited(name=name, kind=kind, **dict.fromkeys(WAYS, "exact: nothing to derive by"))
    generator = torch.Generator().manual_seed(seed)
    points = {n: p.detach() for n, p in function.named_parameters()}
    v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in points.items()}

    def loss(params: Mapping[str, Tensor]) -> Tensor:
        buffers = {n: b.clone() for n, b in function.named_buffers()}  # batch norm writes to them
        z = functional_call(function, {**params, **buffers}, (torch.zeros(1, 1),))
        return function.loss(z, None)

    def nested_forward() -> Tensor:
        def along(params: Points) -> Tensor:
            return jvp(loss, (params,), (v,))[1]

        return jvp(along, (points,), (v,))[1]

    with torch.random.fork_rng(devices=[]):
        truth, v = _smooth_difference(loss, points, v, seed)
        ways: dict[str, Callable[[], Any]] = {
            "double_backward": lambda: _double_backward(loss, points, v),
            "forward_over_reverse": lambda: jvp(jacrev(loss), (points,), (v,))[1],
            "nested_forward": nested_forward,
            "ours": lambda: _ours(function, v, seed),
        }
        if truth is None:
            return Audited(name=name, kind=kind, **dict.fromkeys(WAYS, "kink"))
        form = truth @ _flat(list(v.values()))
        verdicts = {
            way: _verdict(ways[way], form if way == "nested_forward" else truth, seed)
            for way in WAYS
        }
    return Audited(name=name, kind=kind, **verdicts)


class _Lifted(nn.Module):
    """A module as a function of its parameters and of its inputs, which become parameters."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]):
        super().__init__()
        self.module = module
        leaves, self._tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
        moves = [isinstance(t, Tensor) and t.is_floating_point() for t in leaves]
        self.inputs = nn.ParameterList([t for t, m in zip(leaves, moves, strict=True) if m])
        self._leaves = [None if m else t for t, m in zip(leaves, moves, strict=True)]
        self._moves = moves

    @property
    def points(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def forward(self, _: Tensor) -> Tensor:
        """All real outputs, [1, n]."""
        moving = iter(self.inputs)
        leaves = [
            next(moving).clone() if m else t for m, t in zip(self._moves, self._leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        out = pytree.tree_leaves(self.module(*args, **kwargs))
        real = [t for t in out if isinstance(t, Tensor) and t.is_floating_point()]
        return torch.cat([t.reshape(-1) for t in real])[None]

    def loss(self, z: Tensor, _: Any) -> Tensor:
        weights = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype)
        return (weights * z.reshape(-1).square()).sum()


# A tensor for each name of a parameter.
Points = dict[str, Tensor]


def _first(loss: Callable[[Points], Tensor], points: Points, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    leaves = {n: p.clone().requires_grad_() for n, p in points.items()}
    rows = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
    return list(rows)


def _smooth_difference(
    loss: Callable[[Points], Tensor], points: Points, v: Points, seed: int
) -> tuple[Tensor | None, Points]:
    """The derivative of the gradient along v, and v without the elements that meet a kink; None
    where half of them do, or where kinks are left."""
    count = sum(t.numel() for t in v.values())
    for _ in range(ROUNDS):
        truth, rough = _difference(loss, points, v, seed)
        if not rough.any():
            return truth, v
        parts = rough.split([t.numel() for t in v.values()])
        v = {
            n: t.masked_fill(part.view(t.shape), 0)
            for (n, t), part in zip(v.items(), parts, strict=True)
        }
        if 2 * sum(int(t.count_nonzero()) for t in v.values()) < count:
            break
    return None, v


def _difference(
    loss: Callable[[Points], Tensor], points: Points, v: Points, seed: int
) -> tuple[Tensor, Tensor]:
    """The derivative of the gradient along v, extrapolated from two steps, and which of its
    elements are not smooth."""

    def at(h: float) -> Tensor:
        return _flat(_first(loss, {n: p + h * v[n] for n, p in points.items()}, seed))

    h = 5e-5
    here, ahead, behind, ahead_2, behind_2 = (at(h * i) for i in (0, 1, -1, 2, -2))
    near, far = (ahead - behind) / (2 * h), (ahead_2 - behind_2) / (4 * h)
    # It is twice as large at twice the distance where the function is smooth.
    bend, bend_2 = (ahead - 2 * here + behind) / h, (ahead_2 - 2 * here + behind_2) / (2 * h)
    rough = (bend_2 - 2 * bend).abs() > SMOOTH * near.abs().max()
    return (4 * near - far) / 3, rough


def _double_backward(loss: Callable[[Points], Tensor], points: Points, v: Points) -> Points:
    leaves = {n: p.clone().requires_grad_() for n, p in points.items()}
    tensors = list(leaves.values())
    grads = torch.autograd.grad(loss(leaves), tensors, create_graph=True, materialize_grads=True)
    pairs = [(g, v[n]) for n, g in zip(leaves, grads, strict=True) if g.requires_grad]
    if not pairs:
        return {n: torch.zeros_like(p) for n, p in points.items()}
    first, directions = zip(*pairs, strict=True)
    rows = torch.autograd.grad(first, tensors, directions, materialize_grads=True)
    return dict(zip(leaves, rows, strict=True))


def _ours(function: _Lifted, v: Points, seed: int) -> Points:
    operator = Hessian(
        function, function.loss, [(torch.zeros(1, 1), None)], seed=seed, reduction="sum"
    )
    product = operator @ v
    assert isinstance(product, dict)
    return product


def _verdict(way: Callable[[], Points | Tensor], truth: Tensor, seed: int) -> str:
    torch.manual_seed(seed)
    try:
        product = way()
        product = product if isinstance(product, Tensor) else _flat(list(product.values()))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first = " ".join(str(error).split())[:120]
        return f"{'refused' if type(error).__module__.startswith('fast.') else 'fails'}: {first}"
    off = float((product - truth).norm() / truth.norm().clamp_min(1e-12))
    return "exact" if off < EXACT else f"wrong by {off:.1e}" if off == off else "wrong: NaN"


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])
