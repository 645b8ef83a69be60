"""Networks given as a function, and their explicit Hessian and Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.cases import explicit_hessian, explicit_jacobian, loss_at


class Net(nn.Module):
    """forward(x) = function(self, x), with named parts."""

    def __init__(self, function: Callable, **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def batch() -> tuple[Tensor, Tensor]:
    """x [5, 6] in float64 and labels of four classes [5]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 4, (5,), generator=generator)


def truths(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and J^T S J of the cross-entropy, [P, P] each."""
    params = dict(model.named_parameters())
    hessian = explicit_hessian(loss_at(model, x, lambda z: F.cross_entropy(z, y)), params)
    return hessian, explicit_ggn(loss_at(model, x, lambda z: z), params)


def explicit_ggn(outputs: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]):
    """J^T S J of the cross-entropy of outputs [N, C], S = (diag(p) - p p^T) / N row by row."""
    jacobian = explicit_jacobian(outputs, params)
    p = torch.softmax(outputs(params).detach(), -1)
    blocks = [(torch.diag(q) - torch.outer(q, q)) / len(p) for q in p]
    return jacobian.T @ torch.block_diag(*blocks) @ jacobian


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
