"""Lanczos, trace, diagonal, spectral density and conjugate gradients on matrices known in full."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor

from curvature.cases import build
from fast.curvature import (
    GGN,
    Fisher,
    Hessian,
    MatrixOperator,
    Spectrum,
    cg,
    fisher_diagonal,
    hutchinson_diagonal,
    spectrum,
    summarise,
    top,
    trace,
)
from fast.curvature.algorithms.probes import draw_probes
from fast.curvature.algorithms.spectrum import _pad


def _matrix(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)
    )
    a = q @ torch.diag(values) @ q.T
    return (a + a.T) / 2


WEIGHTS = ("weight", "bias")
DECAY = torch.cat([torch.tensor([-9.0, 8.0, 5.0, 5.0, -3.0]), torch.linspace(1, 0, 95)]).double()


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_top_eigenpairs(which: str, block_size: int) -> None:
    values = DECAY.clone()
    if block_size == 1:
        values[3] = 4.5  # one vector at a time cannot see that an eigenvalue is double
    matrix = _matrix(values)
    result = top(MatrixOperator(matrix), 4, which=which, tol=1e-9, block_size=block_size)
    order = {"magnitude": -values.abs(), "largest": -values, "smallest": values}[which].argsort()
    assert result.converged
    torch.testing.assert_close(result.values, values[order[:4]], rtol=1e-8, atol=1e-8)
    errors = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
    assert (errors < 1e-7).all()
    torch.testing.assert_close(errors, result.residuals, rtol=0.1, atol=1e-8)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(result.vectors.T @ result.vectors, eye, rtol=0, atol=1e-10)


def test_top_restarts_and_says_when_it_gave_up() -> None:
    values = torch.linspace(1, 2, 300, dtype=torch.float64)
    operator = MatrixOperator(_matrix(values))
    result = top(operator, 2, subspace=12, max_matvecs=1500, tol=1e-6)
    assert result.converged
    assert result.num_matvecs > 24
    torch.testing.assert_close(result.values, values[[299, 298]], rtol=1e-6, atol=0)
    assert not top(operator, 2, max_matvecs=3, tol=1e-12).converged


def test_top_of_tiny_and_degenerate_matrices() -> None:
    one = top(MatrixOperator(torch.tensor([[3.0]])), 1)
    assert one.values.tolist() == [3.0]
    flat = top(MatrixOperator(2 * torch.eye(5, dtype=torch.float64)), 3)
    torch.testing.assert_close(flat.values, torch.full((3,), 2.0, dtype=torch.float64))
    nothing = top(MatrixOperator(torch.zeros(4, 4)), 2)
    assert nothing.values.tolist() == [0.0, 0.0]


def _low_rank(size: int, rank: int) -> Tensor:
    b = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return b @ b.T


DEGENERATE = {
    "rank 3": (_low_rank(30, 3), 10),
    "rank 3, all": (_low_rank(30, 3), 30),
    "rank 3 of 400": (_low_rank(400, 3), 60),
    "multiple of the identity": (2 * torch.eye(5, dtype=torch.float64), 5),
    "zero": (torch.zeros(6, 6, dtype=torch.float64), 6),
    "two values": (_matrix(torch.tensor([5.0] * 3 + [1.0] * 27).double()), 4),
    "two values of 300": (_matrix(torch.tensor([5.0] * 3 + [1.0] * 297).double()), 5),
    "signs": (_matrix(torch.tensor([-4.0] * 3 + [3.0] * 4 + [0.0] * 30).double()), 7),
    "small": (_matrix(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double()), 3),
    "small, all": (_matrix(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double()), 5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", DEGENERATE)
def test_top_of_krylov_spaces_that_end(name: str, block_size: int, which: str, dtype) -> None:
    matrix, k = DEGENERATE[name]
    matrix = matrix.to(dtype)
    result = top(MatrixOperator(matrix), k, which=which, block_size=block_size, tol=1e-5)
    truth = torch.from_numpy(np.linalg.eigvalsh(matrix.double().numpy()))
    order = {"magnitude": -truth.abs(), "largest": -truth, "smallest": truth}[which].argsort()
    size = float(truth.abs().max())
    assert result.converged
    assert result.num_matvecs <= max(len(matrix), 100)
    small = {"rtol": 0, "atol": size * (1e-8 if dtype == torch.float64 else 2e-5)}
    torch.testing.assert_close(result.values, truth[order[:k]], **small)
    x = result.vectors.double()
    torch.testing.assert_close(x.T @ x, torch.eye(k).double(), rtol=0, atol=1e-5)
    errors = matrix.double() @ x - x * result.values
    assert float(errors.abs().max()) <= 1e-4 * size


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_top_finds_every_copy_when_asked_to(which: str, block_size: int) -> None:
    values = torch.cat(
        [torch.tensor([3.0, 3.0, 3.0, 3.0, -2.0, -2.0, -2.0]), torch.linspace(0, 1, 93)]
    )
    matrix = _matrix(values.double())
    options = {"which": which, "block_size": block_size, "tol": 1e-6}
    result = top(MatrixOperator(matrix), 5, multiple=True, **options)
    key = {"magnitude": -values.abs(), "largest": -values, "smallest": values}[which]
    assert result.converged
    torch.testing.assert_close(result.values, values.double()[key.argsort()[:5]], rtol=0, atol=1e-6)
    errors = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
    assert float(errors.max()) < 1e-4
    fewer = top(MatrixOperator(matrix), 5, **options)
    assert fewer.num_matvecs < result.num_matvecs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_residuals_cover_the_rounding_of_products(dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([9.0, 8.0, -7.0, 2.0]), torch.zeros(96)]).double()
    matrix = _matrix(values).to(dtype)
    result = top(MatrixOperator(matrix), 3)
    vectors = result.vectors.double()
    left = matrix.double() @ vectors - vectors * result.values
    assert bool((left.norm(dim=0) <= result.residuals).all())
    assert float(result.residuals.max()) <= 10 * torch.finfo(dtype).eps * 9.2 + 1e-4 * 9.2


def test_top_of_products_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        top(MatrixOperator(torch.full((4, 4), torch.nan)), 1)


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
def test_top_agrees_with_scipy_on_a_network(kind) -> None:
    model, x, y = build("conv")
    operator = kind(model, F.cross_entropy, (x, y))
    truth = eigsh(operator.to_scipy(), k=3, which="LM", return_eigenvectors=False)
    values = operator.top(3, tol=1e-8).values
    assert sorted(values.tolist()) == pytest.approx(sorted(truth), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace_is_within_its_own_error(method: str) -> None:
    operator = MatrixOperator(_matrix(DECAY))
    estimates = [trace(operator, 30, method=method, seed=10 * s) for s in range(40)]
    z = torch.tensor([(e.value - float(DECAY.sum())) / e.stderr for e in estimates])
    assert z.abs().median() < 1.5
    assert abs(float(torch.tensor([e.value for e in estimates]).mean() - DECAY.sum())) < 2
    assert all(e.num_matvecs == 30 for e in estimates)


def test_hutch_plus_plus_is_exact_on_low_rank() -> None:
    values = torch.cat([torch.tensor([5.0, 3.0, 1.0]), torch.zeros(97)]).double()
    estimate = trace(MatrixOperator(_matrix(values)), 15)
    assert float(estimate) == pytest.approx(9.0, abs=1e-9)
    assert estimate.stderr < 1e-9


@pytest.mark.parametrize("size", [1, 5, 16])
def test_hutch_plus_plus_is_exact_where_the_basis_spans_everything(size: int) -> None:
    matrix = torch.randn(size, size, dtype=torch.float64)
    estimate = trace(MatrixOperator(matrix + matrix.T), 48)
    assert float(estimate) == pytest.approx(2 * float(matrix.trace()), abs=1e-12)
    assert estimate.stderr < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hutch_plus_plus_in_half_precision(dtype: torch.dtype) -> None:
    estimate = trace(MatrixOperator(_matrix(DECAY).to(dtype)), 48)
    assert (
        abs(float(estimate) - float(DECAY.sum())) < 4 * estimate.stderr + 0.05 * DECAY.abs().sum()
    )


def test_the_error_of_a_trace_is_that_of_its_mean() -> None:
    operator = MatrixOperator(torch.ones(2, 2, dtype=torch.float64))  # v^T A v is 0 or 4
    probes = torch.cat([*draw_probes(operator.space, 3, seed=0)])
    values = probes.sum(1).square()
    assert len(set(values.tolist())) == 2
    estimate = trace(operator, 3, method="hutchinson")
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.stderr == pytest.approx(float(values.std()) / 3**0.5)


def test_diagonal_of_an_operator() -> None:
    matrix = _matrix(DECAY)
    error = hutchinson_diagonal(MatrixOperator(matrix), 4000) - matrix.diag()
    off = matrix.square().sum(1) - matrix.diag().square()
    assert ((error / (off / 4000).sqrt()).square().mean()) < 1.5
    eye = hutchinson_diagonal(MatrixOperator(torch.diag(DECAY)), 1)
    torch.testing.assert_close(eye, DECAY)


def test_spectrum_moments_and_density() -> None:
    operator = MatrixOperator(_matrix(DECAY))
    density = spectrum(operator, num_probes=20, num_lanczos_steps=30)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(20, dtype=torch.float64))
    for function in (lambda t: t, torch.square):
        value, stderr = density.expectation(function)
        assert abs(value - float(function(DECAY).sum())) < 4 * stderr + 1e-9
    assert float(density.nodes.max()) == pytest.approx(8.0, rel=1e-6)
    assert float(density.nodes.min()) == pytest.approx(-9.0, rel=1e-6)
    grid, height = density.density()
    assert float(torch.trapezoid(height, grid)) == pytest.approx(1.0, abs=0.02)


def test_spectrum_stops_at_an_invariant_subspace() -> None:
    density = spectrum(MatrixOperator(torch.eye(50, dtype=torch.float64)), 2, 20)
    assert density.nodes.shape == (2, 1)
    torch.testing.assert_close(density.nodes, torch.ones(2, 1, dtype=torch.float64))


def test_conjugate_gradients() -> None:
    matrix = _matrix(DECAY.abs() + 0.1)
    operator = MatrixOperator(matrix)
    b = torch.randn(100, 3, dtype=torch.float64)
    result = cg(operator, b, tol=1e-10, max_iterations=300)
    assert result.converged
    torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(operator.solve(b[:, 0], tol=1e-10), result.solution[:, 0])
    with pytest.raises(ValueError, match="negative"):
        cg(MatrixOperator(-matrix), b)
    assert not cg(operator, b, tol=1e-10, max_iterations=2).converged


@pytest.mark.parametrize("method", ["samples", "signs"])
@pytest.mark.parametrize("name", ["mlp-tanh", "conv", "attention", "layer-norm", "tied"])
def test_fisher_diagonal_with_given_labels(name: str, method: str) -> None:
    model, x, y = build(name)
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    truth = Fisher(model, F.cross_entropy, data, kind="empirical").dense().diag()
    draws = 1 if method == "samples" else 3000
    parts = fisher_diagonal(
        model, F.cross_entropy, data, labels="data", method=method, num_draws=draws
    )
    assert [p.shape for p in parts.values()] == [p.shape for p in model.parameters()]
    estimate = torch.cat([p.reshape(-1) for p in parts.values()])
    tolerance = 1e-12 if method == "samples" else 0.1
    assert float((estimate - truth).norm() / truth.norm()) < tolerance


def test_fisher_diagonal_needs_no_labels() -> None:
    model, x, y = build("mlp-tanh")
    truth = GGN(model, F.cross_entropy, (x, y)).dense().diag()
    parts = fisher_diagonal(model, F.cross_entropy, x, num_draws=800)
    estimate = torch.cat([p.reshape(-1) for p in parts.values()])
    assert float((estimate - truth).norm() / truth.norm()) < 0.1
    again = fisher_diagonal(model, F.cross_entropy, x, num_draws=800)
    torch.testing.assert_close(again, parts, rtol=0, atol=0)


def test_fisher_diagonal_of_predicted_labels() -> None:
    model, x, y = build("mlp-tanh")
    ignored = y.where(torch.arange(len(y)) > 1, -100)
    likeliest = model(x).argmax(1).where(ignored != -100, -100)
    for given, labels in ((None, model(x).argmax(1)), (ignored, likeliest)):
        truth = fisher_diagonal(model, F.cross_entropy, (x, labels), labels="data")
        for method, tolerance, draws in (("samples", 1e-12, 1), ("signs", 0.5, 100)):
            result = fisher_diagonal(
                model,
                F.cross_entropy,
                (x, given),
                labels="predicted",
                method=method,
                num_draws=draws,
            )
            error = torch.stack([(result[n] - truth[n]).norm() / truth[n].norm() for n in truth])
            assert float(error.max()) < tolerance


def test_fisher_diagonal_where_samples_mix() -> None:
    model, x, y = build("batch-norm-train")
    with pytest.raises(ValueError, match="1 \\(BatchNorm1d in train mode\\) mixes"):
        fisher_diagonal(model, F.cross_entropy, (x, y), method="samples")
    parts = fisher_diagonal(model, F.cross_entropy, (x, y))
    assert all((p >= 0).all() for p in parts.values())


@pytest.mark.parametrize(
    ("options", "match"),
    [({"labels": "true"}, "labels"), ({"method": "x"}, "method"), ({"num_draws": 0}, "num_draws")],
)
def test_fisher_diagonal_names_the_bad_option(options: dict, match: str) -> None:
    model, x, y = build("mlp-tanh")
    with pytest.raises(ValueError, match=match):
        fisher_diagonal(model, F.cross_entropy, (x, y), **options)


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


def test_conjugate_gradients_tell_the_residual_of_their_solution() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))[0]
    matrix = (basis * torch.logspace(0, -6, 50, dtype=torch.float64)) @ basis.T
    matrix, b = ((matrix + matrix.T) / 2).float(), torch.randn(50, 2)
    result = cg(MatrixOperator(matrix), b, max_iterations=2000)
    assert result.num_iterations < 2000  # the iteration takes itself to be within 1e-5
    left = b.double() - matrix.double() @ result.solution.double()
    truth = left.norm(dim=0) / b.double().norm(dim=0)
    torch.testing.assert_close(result.residuals, truth, rtol=0.2, atol=0)
    assert float(truth.max()) > 1e-3
    assert not result.converged


def test_conjugate_gradients_refuse_a_direction_without_curvature() -> None:
    singular = MatrixOperator(torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match="negative or zero curvature"):
        cg(singular, torch.tensor([0.0, 1.0]))


def test_a_summary_has_the_figures_of_its_parts() -> None:
    model, x, y = build("mlp-tanh")
    operator = GGN(model, F.cross_entropy, (x, y))
    matrix, places = operator.dense(), operator.space.slices()
    summary = summarise(operator, num_top=2, trace_matvecs=600, num_probes=0)
    assert summary.spectrum is None
    assert summary.gradient_norm == pytest.approx(float(operator.gradient().norm()))
    assert summary.trace.value == pytest.approx(float(matrix.trace()))
    assert sorted(summary.layers) == ["0", "2", "4"]
    for name, layer in summary.layers.items():
        rows = torch.cat([torch.arange(len(matrix))[places[f"{name}.{p}"]] for p in WEIGHTS])
        block = matrix[rows][:, rows]
        assert layer.numel == len(block)
        assert abs(layer.trace.value - float(block.trace())) < 4 * layer.trace.stderr
        assert layer.trace.stderr < 0.2 * float(block.trace())
        largest = float(torch.linalg.eigvalsh(block)[-1])
        assert float(layer.top.values) == pytest.approx(largest, rel=1e-2)
    bare = summarise(operator, layers=None, trace_matvecs=6, num_probes=1, num_lanczos_steps=4)
    assert bare.layers == {}
    assert bare.spectrum is not None
    assert bare.as_dict()["parameters"] == len(matrix)


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
    padded = Spectrum(nodes=nodes, weights=weights, size=8)
    assert padded.expectation(torch.log)[0] == pytest.approx(
        8 * (math.log(5) + (math.log(5) + math.log(6)) / 2) / 2
    )


@pytest.mark.parametrize("algorithm", [trace, functools.partial(spectrum, num_probes=1)])
def test_products_that_are_not_finite(algorithm) -> None:
    with pytest.raises(ValueError, match="not finite"):
        algorithm(MatrixOperator(torch.full((40, 40), torch.nan)))
