"""Denominators, sums, missing labels, and labels drawn from the network."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.cases import build, explicit_hessian, explicit_jacobian, loss_at
from curvature.truth import Net, batch, linear, relative
from fast.curvature import GGN, Fisher, Hessian, fisher_diagonal

WEIGHTS = torch.tensor([1.0, 4.0, 0.2, 3.0], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 5, 4), (5, 4)])
def test_squared_errors_of_targets_that_broadcast(shape: tuple[int, ...], reduction: str) -> None:
    model, x, _ = build("mlp-tanh")
    y = torch.randn(shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    params = dict(model.named_parameters())
    truth = explicit_hessian(
        loss_at(model, x, lambda z: F.mse_loss(z, y, reduction=reduction)), params
    )
    H = Hessian(model, "mse", (x, y), reduction=reduction)
    assert relative(H.dense(), truth) < 1e-10


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_squared_errors_of_samples_of_different_length(kind) -> None:
    """The mean over two batches is that over all their entries, as of one call."""
    torch.manual_seed(0)
    model = linear(3, 2)
    parts = [(torch.randn(4, t, 3).double(), torch.randn(4, t, 2).double()) for t in (2, 5)]
    x, y = (torch.cat([p[i].flatten(0, 1) for p in parts]) for i in (0, 1))
    truth = kind(model, F.mse_loss, (x, y))
    operator = kind(model, F.mse_loss, parts)
    torch.testing.assert_close(operator.dense(), truth.dense())
    torch.testing.assert_close(operator.gradient(), truth.gradient())


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        functools.partial(F.cross_entropy, label_smoothing=0.0),
    ],
    ids=["function", "module", "module-sum", "partial"],
)
def test_the_sum_is_a_sum_over_samples(loss_fn) -> None:
    model, x, y = build("mlp-tanh")
    truth = Hessian(model, F.cross_entropy, (x, y)).dense() * len(x)
    operator = Hessian(model, loss_fn, [(x[:2], y[:2]), (x[2:], y[2:])], reduction="sum")
    torch.testing.assert_close(operator.dense(), truth)
    assert operator.value_and_gradient()[0] == pytest.approx(
        float(F.cross_entropy(model(x).detach(), y, reduction="sum"))
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.huber_loss])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_the_weights_of_entries_count(kind, function, reduction: str) -> None:
    model, x, _ = build("mlp-tanh")
    y, weight = torch.randn_like(model(x)).detach(), torch.rand_like(model(x)).detach()

    def plainly(z: Tensor, y: Tensor) -> Tensor:
        return function(z, y, weight=weight, reduction=reduction)

    loss_fn = functools.partial(function, weight=weight, reduction=reduction)
    operator, truth = kind(model, loss_fn, (x, y)), kind(model, plainly, (x, y))
    torch.testing.assert_close(operator.dense(), truth.dense())
    torch.testing.assert_close(operator.gradient(), truth.gradient())


@pytest.mark.parametrize("method", ["auto", "loop", "folded"])
def test_a_penalty_of_the_weights_in_the_loss_is_refused(method: str) -> None:
    model, x, y = build("mlp-tanh")

    def penalised(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + 0.1 * model[0].weight.square().sum()

    options = {"method": method, "data": (x, y), "loss_fn": penalised}
    for operator in (Hessian(model, **options), GGN(model, **options)):
        for call in (operator.dense, operator.gradient, operator.trace):
            with pytest.raises(ValueError, match=r"loss_fn reads parameter '0\.weight' .*Identity"):
                call()
    head = Hessian(model, params=r"2\..*", **options)  # to which the penalty is a constant
    truth = Hessian(model, F.cross_entropy, (x, y), params=r"2\..*")
    torch.testing.assert_close(head.dense(), truth.dense())


def test_single_samples_have_no_penalty_of_the_weights() -> None:
    model, x, y = build("mlp-tanh")

    def penalised(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + 0.1 * model[0].weight.square().sum()

    for method in ("samples", "signs"):
        with pytest.raises(ValueError, match="loss_fn reads parameter"):
            fisher_diagonal(model, penalised, (x, y), labels="data", method=method)
    with pytest.raises(ValueError, match="loss_fn reads parameter"):
        Fisher(model, penalised, (x, y), kind="empirical").dense()


LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.3),
    "both": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.3, ignore_index=2),
    "sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
    "mse": nn.MSELoss(),
    "mse-sum": nn.MSELoss(reduction="sum"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_labels_have_the_ggn_for_their_mean(name: str) -> None:
    torch.manual_seed(0)
    x, y = batch()
    model = linear(6, 4)
    with torch.no_grad():
        model.weight.mul_(3)
    if "mse" in name:
        y = torch.randn(5, 4, dtype=torch.float64)
    truth = GGN(model, LOSSES[name], (x, y)).dense()
    often = 4000
    many = (x.repeat(often, 1), y.repeat(often, *[1] * (y.ndim - 1)))
    total = often if LOSSES[name].reduction == "sum" else 1
    result = Fisher(model, LOSSES[name], many).dense() / total
    assert relative(result, truth) < 0.06
    for method, data, draws in (("samples", many, 1), ("signs", (x, y), 2000)):
        parts = fisher_diagonal(model, LOSSES[name], data, method=method, num_draws=draws)
        diagonal = torch.cat([p.reshape(-1) for p in parts.values()])
        diagonal = diagonal / (total if data is many else 1)
        assert relative(diagonal, truth.diag()) < 0.1, method


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_the_fisher_matrix_needs_no_label(method: str) -> None:
    model, x, y = build("mlp-tanh")
    truth = Fisher(model, F.cross_entropy, (x, y), method=method).dense()
    for data in (x, [x], {"input": x}, (x, None)):
        operator = Fisher(model, F.cross_entropy, data, method=method)
        torch.testing.assert_close(operator.dense(), truth)
    halves = Fisher(model, F.cross_entropy, [(x[:2], None), (x[2:], None)], method=method)
    labelled = Fisher(model, F.cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])], method=method)
    torch.testing.assert_close(halves.dense(), labelled.dense())
    with pytest.raises(ValueError, match="soft labels must have the shape of the logits"):
        Fisher(model, F.cross_entropy, [x[:2], x[2:]], method=method).dense()
    weighted = Fisher(model, nn.CrossEntropyLoss(weight=WEIGHTS), x, method=method)
    assert bool((torch.linalg.eigvalsh(weighted.dense()) > -1e-12).all())
    with pytest.raises(ValueError, match="loss needs labels"):
        Fisher(model, F.cross_entropy, x).gradient()
    with pytest.raises(ValueError, match="needs one of the keys"):
        Fisher(model, F.cross_entropy, {"input": x}, kind="empirical").dense()


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_a_batch_without_any_label_weighs_nothing(kind, method: str) -> None:
    model, x, y = build("mlp-tanh")
    options = {"kind": "empirical"} if kind is Fisher else {}
    truth = kind(model, F.cross_entropy, (x, y), method=method, **options)
    data = [(x, y), (x, torch.full_like(y, -100))]
    operator = kind(model, F.cross_entropy, data, method=method, **options)
    torch.testing.assert_close(operator.dense(), truth.dense())
    torch.testing.assert_close(operator.gradient(), truth.gradient())
    with pytest.raises(ValueError, match="no batch of data has a sample with a label"):
        kind(model, F.cross_entropy, data[1:], method=method, **options).dense()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
def test_labels_of_any_integer_type(kind, dtype: torch.dtype) -> None:
    model, x, y = build("mlp-tanh")
    truth = kind(model, nn.CrossEntropyLoss(weight=WEIGHTS), (x, y)).dense()
    result = kind(model, nn.CrossEntropyLoss(weight=WEIGHTS), (x, y.to(dtype))).dense()
    torch.testing.assert_close(result, truth)


def test_an_operation_without_a_derivative_at_zero() -> None:
    x, y = batch()
    model = Net(lambda net, x: torch.logcumsumexp(net.first(x), 1), first=linear(6, 4))
    params = dict(model.named_parameters())
    outputs = loss_at(model, x, lambda z: z)
    jacobian = explicit_jacobian(outputs, params)
    inner = explicit_hessian(lambda p: F.cross_entropy(p["z"], y), {"z": outputs(params).detach()})
    truth = jacobian.T @ inner @ jacobian
    assert relative(GGN(model, F.cross_entropy, (x, y)).dense(), truth) < 1e-10
