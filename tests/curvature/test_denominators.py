"""Losses of several batches are the loss of all data at once."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.truth import linear, relative
from fast.curvature import GGN, Fisher, Hessian, Loss, fisher_diagonal
from fast.curvature.losses.denominators import Denominators

WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
CUTS = [(0, 8, 11), (0, 3, 7, 11), (0, 8, 10, 11)]  # the last has a batch without a label
X = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(11) % 3
IGNORED = Y.where((torch.arange(11) < 8) | (torch.arange(11) > 9), -100)
SHARES = torch.rand(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LINEAR, LOG_SOFTMAX = nn.Identity(), nn.LogSoftmax(1)


class Subclass(nn.CrossEntropyLoss):
    pass


class Sharpened(nn.CrossEntropyLoss):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return super().forward(2 * z, y)


class Focal(nn.Module):
    reduction = "sum"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(z, y, reduction="none")
        return ((1 - (-loss).exp()) ** 2 * loss).sum()


def masked(z: Tensor, y: Tensor) -> Tensor:
    kept = y != -100
    loss = F.cross_entropy(z, y.clamp(min=0), reduction="none")
    return (loss * kept).sum() / kept.sum().clamp(min=1)


def cases() -> dict[str, tuple[nn.Module, Any, Tensor]]:
    cases: dict[str, tuple[nn.Module, Any, Tensor]] = {
        "focal": (LINEAR, Focal(), Y),
        "masked": (LINEAR, masked, IGNORED),
        "batchmean": (LOG_SOFTMAX, nn.KLDivLoss(reduction="batchmean"), SHARES),
        "two terms": (LINEAR, lambda z, y: F.cross_entropy(z, y) + z.square().mean(), Y),
    }
    for r in ("mean", "sum"):
        cases |= {
            f"bce {r}": (LINEAR, nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, reduction=r), SHARES),
            f"huber {r}": (LINEAR, nn.HuberLoss(reduction=r), SHARES),
            f"poisson {r}": (LINEAR, nn.PoissonNLLLoss(reduction=r), SHARES),
            f"nll {r}": (LOG_SOFTMAX, nn.NLLLoss(weight=WEIGHTS, reduction=r), IGNORED),
            f"partial {r}": (
                LOG_SOFTMAX,
                functools.partial(F.nll_loss, weight=WEIGHTS, reduction=r),
                IGNORED,
            ),
            f"subclass {r}": (LINEAR, Subclass(weight=WEIGHTS, reduction=r), IGNORED),
            f"own forward {r}": (LINEAR, Sharpened(weight=WEIGHTS, reduction=r), IGNORED),
            f"lambda {r}": (
                LINEAR,
                lambda z, y, r=r: F.cross_entropy(
                    z, y, weight=WEIGHTS, label_smoothing=0.2, reduction=r
                ),
                IGNORED,
            ),
        }
    return cases


CASES = cases()


def batches(y: Any, cuts: tuple[int, ...]) -> list[tuple[Tensor, Any]]:
    return [(X[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_several_batches_are_as_one(kind, name: str) -> None:
    last, loss_fn, y = CASES[name]
    model = nn.Sequential(linear(4, 3), last)
    truth = kind(model, loss_fn, (X, y))
    for cuts in CUTS:
        operator = kind(model, loss_fn, batches(y, cuts))
        torch.testing.assert_close(operator.dense(), truth.dense(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(operator.gradient(), truth.gradient(), rtol=1e-10, atol=1e-12)
        assert operator.check().ok, str(operator.check())


@pytest.mark.parametrize("name", ["bce mean", "bce sum", "nll mean", "focal", "two terms"])
def test_the_empirical_fisher_of_several_batches_is_as_of_one(name: str) -> None:
    last, loss_fn, y = CASES[name]
    model = nn.Sequential(linear(4, 3), last)
    truth = Fisher(model, loss_fn, (X, y), kind="empirical").dense()
    operator = Fisher(model, loss_fn, batches(y, CUTS[1]), kind="empirical")
    torch.testing.assert_close(operator.dense(), truth)
    diagonal = fisher_diagonal(model, loss_fn, batches(y, CUTS[1]), labels="data")
    torch.testing.assert_close(torch.cat([d.flatten() for d in diagonal.values()]), truth.diag())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_numbers_of_samples_are_whole(dtype: torch.dtype) -> None:
    measured = Denominators(lambda z, y: F.smooth_l1_loss(z, y))
    for count in (7, 11, 3, 64):
        z, y = torch.randn(count, 3, dtype=dtype), torch.randn(count, 3, dtype=dtype)
        assert measured.weight(z, y, count) == count


def weighted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=WEIGHTS)


@pytest.mark.parametrize(
    ("kind", "options", "loss_fn"),
    [
        (Hessian, {}, lambda z, y: F.mse_loss(z, y.double()[:, None].expand_as(z)).sqrt()),
        (GGN, {}, lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z)))),
        (Fisher, {"kind": "empirical"}, weighted),
        (Hessian, {}, lambda z, y: z.sum() * 0 + 1),
        (Hessian, {}, lambda z, y: F.cross_entropy(z, y, reduction="sum") + 1),
    ],
    ids=["root of a mean", "across samples", "weighted samples", "flat", "a sum and a constant"],
)
def test_what_cannot_be_known_is_refused_with_a_way_out(kind, options, loss_fn) -> None:
    model = linear(4, 3)
    data = batches(Y, CUTS[0])
    with pytest.raises(ValueError, match=r"several batches: .*denominator=lambda output, target"):
        kind(model, loss_fn, data, **options).dense()
    kind(model, loss_fn, data[:1], **options).dense()
    loss = Loss(loss_fn, denominator=lambda z, y: len(z))
    kind(model, loss, data, **options).dense()


def test_outputs_that_cannot_be_joined_are_refused() -> None:
    data = [(torch.randn(2, t, 4).double(), torch.zeros(2, t).long()) for t in (3, 5)]

    def tokens(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    model = linear(4, 3)
    with pytest.raises(ValueError, match="batches cannot be joined"):
        Hessian(model, tokens, data).dense()
    counted = Loss(tokens, denominator=lambda z, y: y.numel())
    flat = [(x.flatten(0, 1), y.flatten()) for x, y in data]
    truth = Hessian(model, F.cross_entropy, flat).dense()
    assert relative(Hessian(model, counted, data).dense(), truth) < 1e-10


def test_check_sees_a_wrong_denominator() -> None:
    data = batches(Y, CUTS[0])
    right = Loss(weighted, denominator=lambda z, y: WEIGHTS[y].sum())
    assert GGN(linear(4, 3), right, data).check().ok
    for wrong in (
        Loss(weighted, denominator=lambda z, y: len(z)),
        Loss(weighted, reduction="sum"),
    ):
        assert GGN(linear(4, 3), wrong, data).check().failures == ["denominators"]


@pytest.mark.parametrize("loss_fn", [nn.HuberLoss(), nn.NLLLoss(weight=WEIGHTS)])
def test_the_sum_of_a_known_mean_is_over_its_entries(loss_fn) -> None:
    model = nn.Sequential(linear(4, 3), nn.LogSoftmax(1))
    y = SHARES if isinstance(loss_fn, nn.HuberLoss) else Y
    truth = Hessian(model, type(loss_fn)(reduction="sum", **_weight(loss_fn)), (X, y))
    product = Hessian(model, loss_fn, batches(y, CUTS[1]), reduction="sum")
    torch.testing.assert_close(product.dense(), truth.dense())


def _weight(loss_fn: nn.Module) -> dict[str, Any]:
    weight = getattr(loss_fn, "weight", None)
    return {} if weight is None else {"weight": weight}


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.L1Loss, nn.MultiMarginLoss])
def test_a_loss_that_is_not_reduced_is_refused(kind) -> None:
    with pytest.raises(ValueError, match="reduction='none'"):
        Hessian(linear(4, 3), kind(reduction="none"), (X[:1], Y[:1]))


def test_weights_of_a_loss_that_change_are_seen() -> None:
    model, loss_fn = linear(4, 3), nn.BCEWithLogitsLoss(pos_weight=WEIGHTS.clone())
    operator = Hessian(model, loss_fn, (X, SHARES))
    before = operator.dense()
    loss_fn.pos_weight *= 2
    assert relative(operator.dense(), before) > 0.1
