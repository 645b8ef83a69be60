"""Operations whose second derivatives are wrong or missing in some way of torch: name -> module.

Each has its point as a parameter, so that a network of it alone shows the error. As a script it
prints the table of docs/curvature.md:

    python tests/curvature/errors.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.curvature.audit import WAYS, Audited, audit_module


class Point(nn.Module):
    """function(parameter), for any input."""

    def __init__(self, function: Callable[[Tensor], Tensor], point: Tensor):
        super().__init__()
        self.function, self.point = function, nn.Parameter(point.double())

    def forward(self, _: Tensor) -> Tensor:
        return self.function(self.point).reshape(1, -1)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _rbf(x: Tensor) -> Tensor:
    """exp(-|x - y|^2 / 2) at x = y, by way of the norm."""
    return torch.exp(-(x - x.detach()).norm().square() / 2)


WEIGHT = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
SCALE = torch.tensor([1.5, -0.5, 1.0], dtype=torch.float64)
# name -> (thread of pytorch/pytorch, function, point)
OPEN: dict[str, tuple[int, Callable[[Tensor], Tensor], Tensor]] = {
    "layer_norm": (196700, lambda x: F.layer_norm(x, (4,), WEIGHT, None, 0.25), _random(2, 4)),
    "layer_norm, its own scale": (
        196700,
        lambda x: F.layer_norm(x[:2], (4,), x[2], x[3], 0.25),
        _random(4, 4),
    ),
    "batch_norm in training": (
        196699,
        lambda x: F.batch_norm(x, None, None, SCALE, None, True, 0.1, 0.25),
        _random(6, 3),
    ),
    "cumprod through zero": (196701, lambda x: x.cumprod(0), torch.tensor([2.0, 0.0, 3.0, 4.0])),
    "linalg.det": (192540, torch.linalg.det, _random(3, 3)),
    "linalg.det, equal singular values": (192521, torch.linalg.det, torch.eye(3)),
    "linalg.slogdet": (192540, lambda x: torch.linalg.slogdet(x)[1], _random(3, 3)),
    "linalg.solve": (192540, lambda x: torch.linalg.solve(x, x[0] ** 2), _random(3, 3)),
    "cholesky_solve": (
        198017,
        lambda x: torch.cholesky_solve(x[:2].T, torch.linalg.cholesky(x @ x.T + torch.eye(3))),
        _random(3, 3),
    ),
    "cholesky_inverse": (
        198017,
        lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x @ x.T + torch.eye(3))),
        _random(3, 3),
    ),
    "householder_product": (
        198017,
        lambda x: torch.linalg.householder_product(x[:, :2], x[:2, 2].square()),
        _random(3, 3),
    ),
    "RBF kernel at distance 0": (92075, _rbf, _random(3)),
    "scaled_dot_product_attention": (
        117974,
        lambda x: F.scaled_dot_product_attention(x[0], x[1], x[2]),
        _random(3, 1, 2, 4, 5),
    ),
}


def build(name: str) -> nn.Module:
    _, function, point = OPEN[name]
    return Point(function, point)


def row(name: str) -> Audited:
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    return audit_module(name, build(name), (nothing,), {})


def main() -> None:
    lines = ["| operation, thread | double backward | jvp(jacrev) | jvp(jvp) | fast |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name in OPEN:
        audited = row(name)
        cells = [f"{name}, #{OPEN[name][0]}"]
        cells += [getattr(audited, way).partition(":")[0] for way in WAYS]
        lines.append(f"| {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
