"""`check` passes what is right and names what is wrong; bad input gets a message that helps."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvature.cases import build
from curvature.truth import batch, linear
from fast.curvature import GGN, Fisher, Hessian, Loss, MatrixOperator
from fast.curvature.operators.mean import WeightedMean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["mlp-tanh", "layer-norm", "attention", "batch-norm-train", "lstm"]
)
@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
def test_check_passes_on_a_good_operator(kind, name: str, dtype: torch.dtype) -> None:
    model, x, y = build(name, dtype)
    report = kind(model, F.cross_entropy, [(x[:3], y[:3]), (x[3:], y[3:])]).check()
    assert report.ok, str(report)


def test_check_finds_an_asymmetry() -> None:
    matrix = torch.randn(20, 20, dtype=torch.float64)
    matrix = matrix + matrix.T
    assert MatrixOperator(matrix).check().ok
    matrix[3, 4] += 0.01
    assert MatrixOperator(matrix).check().failures == ["symmetry"]


def test_the_asymmetry_is_relative_to_the_matrix_whatever_its_size() -> None:
    for size in (20, 500):
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(size, size, dtype=torch.float64, generator=generator)
        matrix = MatrixOperator(random + random.T + 1e-3 * (random - random.T))
        reports = [matrix.check(seed=seed).findings[1].detail for seed in range(20)]
        error = sum(float(detail.split()[-1]) for detail in reports) / 20
        assert 0.3e-3 < error < 3e-3, (size, error)


def test_check_finds_a_shuffled_loader() -> None:
    model, x, y = build("mlp-tanh")
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    torch.manual_seed(0)
    report = Hessian(model, F.cross_entropy, loader).check()
    assert "data" in report.failures
    with pytest.raises(ValueError, match="list\\(loader\\)"):
        report.raise_if_failed()


def test_check_finds_active_dropout() -> None:
    model, x, y = build("dropout")
    report = Hessian(model, F.cross_entropy, (x, y)).check()
    assert report.failures == ["dropout"]
    assert "['1']" in str(report)
    model.eval()
    assert Hessian(model, F.cross_entropy, (x, y)).check().ok


class Casting(nn.Module):
    """Its head is of float32, whatever the type of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5).double(), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh().float())


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_check_takes_no_difference_of_a_network_that_fails_in_float64(kind) -> None:
    _, x, y = build("mlp-tanh")
    report = kind(Casting(), F.cross_entropy, (x, y)).check(rtol=1e-4)
    assert report.ok, str(report)
    assert "no difference: a copy of the network in float64 fails (mat1 and mat2" in str(report)


class Detaching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = super().forward(x)
        return z * z.detach()


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Detaching(6, 4).double(), torch.randn(5, 6, dtype=torch.float64)),
        (
            nn.Sequential(
                nn.Embedding(6, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 4)
            ).double(),
            torch.arange(10).view(5, 2) % 6,
        ),
    ],
    ids=["detach", "padding_idx"],
)
def test_check_says_what_a_difference_moves(kind, model: nn.Module, x: torch.Tensor) -> None:
    report = kind(model, F.cross_entropy, (x, torch.arange(5) % 4)).check()
    assert report.failures == ["difference"]
    assert "it moves what the network detaches and the row padding_idx" in str(report)


def test_check_finds_a_network_that_is_not_a_function() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.calls = nn.Linear(6, 4).double(), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.out(x * (1 + self.calls))

    _, x, y = build("mlp-tanh")
    report = Hessian(Moody(), F.cross_entropy, [(x, y), (x, y)]).check()
    assert "determinism" in report.failures


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"data": 3}, "data must be a batch"),
        ({"data": []}, "no batch"),
        ({"model": torch.jit.trace(torch.nn.ReLU(), torch.ones(1))}, "is a TorchScript module"),
        ({"data": [{"x": 1}]}, "needs one of the keys"),
        ({"loss_fn": "hinge"}, "loss_fn must be"),
        ({"params": ["missing"]}, "'missing', which is no parameter"),
        ({"params": "missing.*"}, "matches no parameter"),
        ({"params": lambda n, p: False}, "selects no parameter"),
        ({"reduction": "max"}, "reduction must be"),
        ({"method": "magic"}, "method must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"loss_fn": lambda z, y: z}, "one number per batch"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, match: str) -> None:
    model, x, y = build("mlp-tanh")
    call = {"model": model, "loss_fn": F.cross_entropy, "data": (x, y), **arguments}
    with pytest.raises((ValueError, TypeError), match=match):
        Hessian(**call).matmat(torch.zeros(89, dtype=x.dtype))


def test_bad_vectors_are_named() -> None:
    model, x, y = build("mlp-tanh")
    H = Hessian(model, F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match="V must be \\[P\\] or \\[P, K\\] with P = 89"):
        H @ torch.zeros(3, dtype=x.dtype)
    with pytest.raises(ValueError, match=r"pass V.to\('cpu', torch.float64\)"):
        H @ torch.zeros(H.shape[0])
    with pytest.raises(ValueError, match="missing"):
        H @ {"0.weight": torch.zeros(1, 5, 6, dtype=x.dtype)}
    with pytest.raises(TypeError, match="V must be a tensor or a dict"):
        H @ [1.0]


def test_a_function_that_cannot_be_differentiated_twice_is_named() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    class Fancy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Once.apply(x)

    model = nn.Sequential(nn.Linear(6, 5), Fancy(), nn.Linear(5, 4)).double()
    _, x, y = build("mlp-tanh")
    H = Hessian(model, F.cross_entropy, (x, y))
    with pytest.raises(RuntimeError, match="'1' \\(Fancy\\)"):
        H @ torch.zeros(H.shape[0], dtype=x.dtype)


MODEL = nn.Linear(6, 4)
X, LABELS = torch.randn(5, 6), torch.arange(5) % 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda H: H.top(1.5), "k must be a whole number; got 1.5"),
        (lambda H: H.top(1, tol=float("nan")), "tol must be a finite number"),
        (lambda H: H.trace(num_matvecs=6.5), "num_matvecs must be a whole number"),
        (lambda H: H.spectrum(num_probes="4"), "num_probes must be a whole number"),
        (lambda H: H.solve(torch.full((28,), torch.nan)), "b holds NaN"),
        (lambda H: H.quad(torch.full((28,), torch.nan)), "V holds NaN"),
        (lambda H: H.damped(float("nan")), "damping must be a finite number"),
        (lambda H: H * float("inf"), "factor must be a finite number"),
        (lambda H: GGN(MODEL, F.cross_entropy, (X, LABELS - 2)).dense(), "labels must be classes"),
        (lambda H: Hessian(MODEL, "mse", (X, X), memory_budget="1GB"), "memory_budget must be"),
        (lambda H: Hessian(MODEL, "mse", (X, X), seed="a"), "seed must be a whole number"),
        (lambda H: Hessian(MODEL, Loss(F.mse_loss), (X, X), reduction="sum"), "reduction='sum'"),
    ],
)
def test_numbers_that_mean_nothing_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(Hessian(MODEL, F.cross_entropy, (X, LABELS)))
    assert len(str(caught.value).splitlines()) == 1


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
