"""Operators: their algebra, the parameters they take, and errors that name what is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.cases import build
from curvature.truth import linear
from fast.curvature import GGN, Fisher, Hessian, MatrixOperator, SecondDerivativeError
from fast.curvature.products.batched import UnsupportedOperation


def test_bfloat16_in_scipy() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0])).bfloat16()
    operator = MatrixOperator(matrix).to_scipy()
    assert operator.dtype == np.float32
    np.testing.assert_array_equal(operator @ np.eye(3), np.diag([1.0, 2.0, 4.0]))


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_forms_and_traces_of_sums_and_multiples(method: str) -> None:
    model, x, y = build("mlp-tanh")
    H, G = (kind(model, F.cross_entropy, (x, y)) for kind in (Hessian, GGN))
    operator = -3 * H + (G / 2 - H).damped(0.25)
    matrix = G.dense() / 2 - 4 * H.dense() + 0.25 * torch.eye(len(G.dense()), dtype=torch.float64)
    torch.testing.assert_close(operator.dense(), matrix)
    v = torch.randn(len(matrix), 3, dtype=torch.float64)
    torch.testing.assert_close(operator.quad(v), (v * (matrix @ v)).sum(0))
    estimate = operator.trace(num_matvecs=60, method=method)
    assert abs(float(estimate) - float(matrix.trace())) < 4 * estimate.stderr


def test_division() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close((MatrixOperator(matrix) / 4).dense(), matrix / 4)
    with pytest.raises(TypeError):
        MatrixOperator(matrix) / matrix


def test_parameters_by_module_and_by_tensor() -> None:
    model, x, y = build("conv")
    names = ["out.weight", "out.bias"]
    truth = Hessian(model, F.cross_entropy, (x, y), names).dense()
    of_module = Hessian(model, F.cross_entropy, (x, y), model.out)
    assert of_module.space.names == tuple(names)
    torch.testing.assert_close(of_module.dense(), truth)
    assert Hessian(model, F.cross_entropy, (x, y), model.out.bias).space.names == ("out.bias",)
    with pytest.raises(ValueError, match="is no regular expression"):
        Hessian(model, F.cross_entropy, (x, y), "(")
    with pytest.raises(ValueError, match="which is no parameter of the model"):
        Hessian(model, F.cross_entropy, (x, y), linear(2, 2))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_loss_without_a_second_derivative_is_named(kind) -> None:
    model, x, y = build("mlp-tanh")
    operator = kind(model, lambda z, _: _Once.apply(z), (x, y))
    with pytest.raises(SecondDerivativeError, match=r"loss.* cannot be differentiated twice"):
        operator.dense()


def test_an_operation_without_a_rule_says_what_to_do() -> None:
    model, x, y = build("lstm")
    with pytest.raises(UnsupportedOperation, match="use method='auto' or 'loop'"):
        Hessian(model, F.cross_entropy, (x, y), method="folded").dense()


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_blocks_keep_the_settings_of_the_whole(method: str) -> None:
    """A block is an operator over some parameters, with all else the same."""
    model, x, y = build("conv")
    whole = Fisher(
        model, F.cross_entropy, (x, y), kind="empirical", method=method, chunk=2, reduction="sum"
    )
    block = whole.block(["out.weight"])
    assert block.settings is whole.settings
    assert block.kind == "empirical"
    rows = whole.space.slices()["out.weight"]
    torch.testing.assert_close(block.dense(), whole.dense()[rows, rows])
