"""Is this operator one symmetric matrix, and the right one? A handful of products will tell."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fast.curvature.algorithms.probes import probe_block
from fast.curvature.losses.denominators import joint, tolerance
from fast.curvature.network.batches import Batch
from fast.curvature.operators.base import SymmetricOperator
from fast.curvature.operators.hessian import GGN, Hessian, NetworkOperator
from fast.curvature.operators.mean import WeightedMean

RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A difference has an error of its own, and the float64 copy is not the rounded network.
DIFFERENCE_RTOL = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 0.25,
}

# Batches that are put into one call with the first.
NUM_JOINED = 8


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str


@dataclass
class CheckReport:
    """What was looked at. `ok` when nothing is wrong; `raise_if_failed` turns it into an error."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.findings)

    @property
    def failures(self) -> list[str]:
        return [f.name for f in self.findings if not f.ok]

    def raise_if_failed(self) -> None:
        if not self.ok:
            raise ValueError(str(self))

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(
            f"{'ok  ' if f.ok else 'FAIL'} {f.name}: {f.detail}" for f in self.findings
        )


def check(operator: SymmetricOperator, *, rtol: float | None = None, seed: int = 0) -> CheckReport:
    """Determinism, symmetry and linearity of any operator; for networks also the data, what the
    loss divides batches by, and a central difference in float64 on a copy of the model.

    Args:
        rtol: largest relative error to accept; default 1e-8 in float64, 1e-4 in float32, 1e-2 in
            float16, 5e-2 in bfloat16. A network with kinks (ReLU) may fail the difference, and only
            that, by a kink inside the step.
    """
    rtol = rtol or RTOL[operator.dtype]
    report = CheckReport()
    generator = torch.Generator().manual_seed(seed)
    u, v = probe_block(operator, 2, generator=generator, distribution="normal")
    both = operator.rows(torch.stack([u, v]))
    au, av = both

    def add(name: str, error: float, detail: str, limit: float = rtol) -> None:
        report.findings.append(Finding(name, error <= limit, f"{detail}, relative {error:.1e}"))

    again = operator.rows(torch.stack([u, v]))
    add("determinism", _relative(again, both), "the same product twice")
    size = float(u.norm() * av.norm() + v.norm() * au.norm()) or 1.0
    # Random u and Av are nearly orthogonal: u.Av is about |u| |Av| / sqrt(P).
    spread = size / operator.shape[0] ** 0.5
    add(
        "symmetry",
        abs(float(u.double() @ av.double() - v.double() @ au.double())) / spread,
        "u.Av against v.Au",
    )
    add("linearity", _relative(operator.rows((2 * u - v)[None])[0], 2 * au - av), "A(2u - v)")
    if isinstance(operator, NetworkOperator):
        report.findings += _data_findings(operator)
        report.findings += _mode_findings(operator)
        report.findings += _denominator_findings(operator)
        if isinstance(operator, Hessian) or type(operator) is GGN:
            error = _difference_error(operator, v, av)
            limit = max(rtol, DIFFERENCE_RTOL[operator.dtype])
            add("difference", error, "central difference in float64", limit)
    return report


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))


def _data_findings(operator: NetworkOperator) -> list[Finding]:
    first, second = ([_fingerprint(b) for b in operator.data] for _ in range(2))
    detail = f"{len(first)} batches, the same in two passes"
    if first != second:
        detail = "batches differ between two passes over the data: turn shuffling and augmentation "
        detail += "off, or pass list(loader)"
    return [Finding("data", first == second, detail)]


def _fingerprint(batch: Batch) -> str:
    digest = hashlib.blake2b()
    for leaf in map(_padded, pytree.tree_leaves((batch.inputs, batch.target))):
        if isinstance(leaf, Tensor):
            digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
            digest.update(leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _padded(leaf: Any) -> Any:
    nested = isinstance(leaf, Tensor) and leaf.is_nested
    return torch.nested.to_padded_tensor(leaf.detach(), 0) if nested else leaf


def _mode_findings(operator: NetworkOperator) -> list[Finding]:
    active = [
        name
        for name, module in operator.network.model.named_modules()
        if module.training and _drop_probability(module) > 0
    ]
    if not active:
        return [Finding("dropout", True, "none active")]
    detail = f"active in {active[:3]}: the products are of one random thinned network (seed "
    detail += f"{operator.network.seed}); call model.eval() for the network itself"
    return [Finding("dropout", False, detail)]


def _denominator_findings(operator: NetworkOperator) -> list[Finding]:
    """Whether batches weigh what they do in a loss of two of them in one call."""
    loss, answers = operator.loss, _answers(operator)
    batches = [(z, y, w) for z, y, size in answers if (w := loss.weight(z, y, size))]
    seen, largest = 0, 0.0
    for z, y, weight in batches[1 : 1 + NUM_JOINED]:
        first, first_y, unit = batches[0]
        try:
            both = joint(loss.value, (first, first_y), (z, y))
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue  # batches of different shapes are no batch together
        expected = 1.0 if loss.reduction == "sum" else unit / (unit + weight)
        if both.first == both.first:
            seen += 1
            largest = max(largest, abs(both.first - expected) if both.additive else 1.0)
    if not seen:
        return []
    detail = f"{seen} batches, each in one call with the first, off by {largest:.1e}"
    if not (ok := largest < tolerance(batches[0][0])):
        detail += ": the loss of all data is another mean than the one over batches"
    return [Finding("denominators", ok, detail)]


def _drop_probability(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    rate = getattr(module, "dropout", 0.0)  # LSTM, MultiheadAttention
    return float(rate) if isinstance(rate, int | float) else 0.0


def _difference_error(operator: NetworkOperator, v: Tensor, av: Tensor) -> float:
    """Central difference, of the gradient (Hessian) or the outputs (GGN), against av."""
    model = _copy(operator.network.model).double()
    data = [Batch(_double(b.inputs), _double(b.target)) for b in operator.data]
    exact = isinstance(operator, Hessian)
    options = {**operator.options, "method": "loop"}
    reference = type(operator)(model, operator.loss, data, operator.space.names, **options)
    params = dict(model.named_parameters())
    direction = dict(zip(operator.space.names, operator.space.split(v[None]), strict=True))
    norm = float(v.double().norm())
    length = sum(float(p.detach().norm()) ** 2 for p in params.values()) ** 0.5
    step = 1e-5 * max(1.0, length) / norm

    def at(sign: float) -> list[Tensor]:
        with torch.no_grad():
            for n, d in direction.items():
                params[n].add_(d[0].double(), alpha=sign * step)
        result = [reference.gradient()] if exact else [z for z, _, _ in _answers(reference)]
        with torch.no_grad():
            for n, d in direction.items():
                params[n].sub_(d[0].double(), alpha=sign * step)
        return result

    tangents = [(a - b) / (2 * step) for a, b in zip(at(1.0), at(-1.0), strict=True)]
    if exact:
        return _relative(av.double(), tangents[0])
    loss = reference.loss
    mean = WeightedMean(loss.reduction, operator.process_group)
    for (z, y, size), t in zip(_answers(reference), tangents, strict=True):
        weight = loss.weight(z, y, size)
        mean.reduction = loss.reduction
        mean.add([loss.hessian(z, y).quad(t[None])[0]], weight)
    quad = float(mean.result([torch.zeros((), dtype=torch.float64, device=v.device)])[0])
    return abs(quad - float(v.double() @ av.double())) / max(abs(quad), 1e-30)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, of modules too that keep a computed tensor (old-style weight and spectral norm):
    deepcopy refuses those, and they are computed anew anyway."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _answers(operator: NetworkOperator) -> list[tuple[Tensor, Any, int]]:
    """Output, target and size of every batch."""
    network, out = operator.network, []
    for index, batch in enumerate(operator.data):
        batch = batch.to(operator.device)
        network.look_for_classes(batch, operator.loss)
        with network.scope(index, differentiable_twice=True):
            z, y = network.answers(network.leaves(), batch, operator.loss)
        out.append((z.detach(), y, batch.size))
    return out


def _double(tree: object) -> object:
    return pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )
