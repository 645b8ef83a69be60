"""Check by a handful of products whether an operator is one symmetric matrix, and the right one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fast.curvature.algorithms.probes import normal_block
from fast.curvature.algorithms.protocol import Symmetric

RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check has found."""

    name: str
    ok: bool
    detail: str


@dataclass
class CheckReport:
    """All findings. `ok` when nothing is wrong; `raise_if_failed` turns it into a ValueError."""

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


class Checkable(Symmetric, Protocol):
    """A matrix that may add findings of its own."""

    def findings(self, v: Tensor, av: Tensor, rtol: float) -> list[Finding]:
        """What is checked of this kind of matrix alone, given one product A v (both [P])."""


def check(operator: Checkable, *, rtol: float | None = None, seed: int = 0) -> CheckReport:
    """Determinism, symmetry and linearity of any operator; for networks also the data, what the
    loss divides batches by, and a central difference in float64 on a copy of the model.

    Args:
        rtol: largest relative error to accept; default 1e-8 in float64, 1e-4 in float32, 1e-2 in
            float16, 5e-2 in bfloat16. A network with kinks (ReLU) may fail the difference, and only
            that, by a kink inside the step. So may one that detaches a part or reads the row
            `padding_idx`: these are constants of its products, as they are for autograd. Where a
            network fails in float64 (it casts to a type of its own), no difference is taken.
    """
    space = operator.space
    limit = rtol or RTOL[space.dtype]
    u, v = normal_block(space, 2, torch.Generator().manual_seed(seed))
    both, again = (operator.rows(torch.stack([u, v])) for _ in range(2))
    au, av = both
    a_combination = operator.rows((2 * u - v)[None])[0]
    # Random u and Av are nearly orthogonal: u.Av is about |u| |Av| / sqrt(P).
    size = (float(u.norm() * av.norm() + v.norm() * au.norm()) or 1.0) / space.numel**0.5
    asymmetry = abs(float(u.double() @ av.double() - v.double() @ au.double())) / size
    findings = [
        compared("determinism", relative_error(again, both), "the same product twice", limit),
        compared("symmetry", asymmetry, "u.Av against v.Au", limit),
        compared("linearity", relative_error(a_combination, 2 * au - av), "A(2u - v)", limit),
    ]
    return CheckReport(findings + operator.findings(v, av, limit))


def compared(name: str, error: float, detail: str, limit: float) -> Finding:
    """A finding that is fine where a relative error is at most `limit`."""
    return Finding(name=name, ok=error <= limit, detail=f"{detail}, relative {error:.1e}")


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))
