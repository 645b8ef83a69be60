"""Types, sizes and algebra at the edges: half precision, tiny sides, results that are not there."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from curvature_cases import build
from curvature_truth import batch, linear
from fast.curvature import (
    GGN,
    Hessian,
    MatrixOperator,
    SecondDerivativeError,
    Spectrum,
    cg,
    spectrum,
    trace,
)
from fast.curvature.algorithms.spectrum import _pad
from fast.curvature.operators.mean import WeightedMean
from fast.curvature.products.batched import UnsupportedOperation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp-tanh", "layer-norm", "conv", "attention"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_check_passes_in_half_precision(kind, name: str, dtype: torch.dtype) -> None:
    model, x, y = build(name, dtype)
    report = kind(model, F.cross_entropy, (x, y)).check()
    assert report.ok, str(report)


def test_check_still_finds_what_is_wrong_in_half_precision() -> None:
    matrix = torch.randn(20, 20)
    matrix = (matrix + matrix.T).bfloat16()
    matrix[3, 4] += 20
    assert "symmetry" in MatrixOperator(matrix).check().failures


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_check_copies_modules_that_keep_a_computed_tensor(wrap) -> None:
    x, y = batch()
    model = nn.Sequential(wrap(linear(6, 5)), nn.Tanh(), linear(5, 4)).eval()
    model(x)
    report = Hessian(model, F.cross_entropy, (x, y)).check()
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_check_of_a_process_group(kind, tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        model, x, y = build("mlp-tanh")
        report = kind(model, F.cross_entropy, (x, y), process_group=dist.group.WORLD).check()
        assert report.ok, str(report)
        mixed = [torch.full((2,), 0.5, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)]
        mean = WeightedMean(dist.group.WORLD)
        mean.add(mixed, 257.0, "mean")  # no number of bfloat16
        out = mean.result()
        assert [o.dtype for o in out] == [torch.bfloat16, torch.float64]
        assert [o.tolist() for o in out] == [[0.5, 0.5], [1.0]]
        assert mean.weight == 257.0
    finally:
        dist.destroy_process_group()


def test_bfloat16_in_scipy() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0])).bfloat16()
    operator = MatrixOperator(matrix).to_scipy()
    assert operator.dtype == np.float32
    np.testing.assert_array_equal(operator @ np.eye(3), np.diag([1.0, 2.0, 4.0]))


def test_division() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close((MatrixOperator(matrix) / 4).dense(), matrix / 4)
    with pytest.raises(TypeError):
        MatrixOperator(matrix) / matrix


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_conjugate_gradients_at_any_scale(scale: float) -> None:
    matrix = torch.diag(torch.linspace(1, 2, 10))
    b = torch.ones(10) * torch.tensor(scale)
    result = cg(MatrixOperator(matrix), torch.stack([b, torch.zeros(10)], 1), tol=1e-6)
    assert result.converged
    torch.testing.assert_close(
        result.solution[:, 0].double(), b.double() / matrix.diag().double(), rtol=1e-2, atol=0
    )
    assert bool((result.solution[:, 1] == 0).all())


def test_solve_says_when_it_gave_up() -> None:
    operator = MatrixOperator(torch.diag(torch.linspace(1, 50, 40).double()))
    b = torch.ones(40, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="after 2 iterations the relative residual is"):
        operator.solve(b, max_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.solve(b)


def test_shorter_lanczos_runs_add_no_eigenvalue() -> None:
    short = torch.tensor([5.0]).double(), torch.tensor([5.0, 6.0]).double()
    nodes = _pad(list(short), 2, weights=False)
    weights = _pad([torch.ones(1).double(), torch.full((2,), 0.5).double()], 2, weights=True)
    assert nodes.tolist() == [[5.0, 5.0], [5.0, 6.0]]
    padded = Spectrum(nodes, weights, 8)
    assert padded.expectation(torch.log)[0] == pytest.approx(
        8 * (math.log(5) + (math.log(5) + math.log(6)) / 2) / 2
    )


@pytest.mark.parametrize("algorithm", [trace, functools.partial(spectrum, num_probes=1)])
def test_products_that_are_not_finite(algorithm) -> None:
    with pytest.raises(ValueError, match="not finite"):
        algorithm(MatrixOperator(torch.full((40, 40), torch.nan)))


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
