"""Classes are found where the head puts them: last behind a linear layer, else second."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from curvature.truth import Net, linear, relative
from fast.curvature import GGN, CrossEntropy, Fisher, Hessian, fisher_diagonal
from fast.curvature.card.answers import divergence, expected_rise
from fast.data.source_inputs import SourceInputs
from fast.heads.outputs import source_logits

X = torch.randn(8, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tokens(classes: int = 6) -> nn.Module:
    """[N, 5, 4] -> [N, 5, C]"""
    torch.manual_seed(1)
    parts = {"first": linear(4, 4), "out": linear(4, classes)}
    return Net(lambda net, x: net.out(torch.tanh(net.first(x))), **parts)


def transposed(model: nn.Module) -> nn.Module:
    return Net(lambda net, x: net.inner(x).transpose(1, 2), inner=model)


def maps(classes: int = 6) -> nn.Module:
    """[N, 5, 4] -> [N, C, 1, 4], by convolutions."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(5, 4, 1), nn.Tanh(), nn.Conv2d(4, classes, 1))
    return nn.Sequential(nn.Unflatten(1, (5, 1)), *layers).double()


def equal_logits(form: str, classes: int) -> nn.Module:
    """A network whose logits of one token (or pixel) are all equal, whatever its weights are."""
    model = maps(classes) if form == "maps" else tokens(classes)
    head = model[-1] if form == "maps" else model.out
    nn.init.ones_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return transposed(model) if form == "second" else model


@pytest.mark.parametrize("classes", [6, 5, 4])
@pytest.mark.parametrize("form", ["last", "second", "maps"])
def test_a_card_of_answers_that_cannot_change_is_zero(form: str, classes: int) -> None:
    """With as many classes as tokens (5) or pixels (4), too."""
    model = equal_logits(form, classes)
    with pytest.warns(RuntimeWarning, match="no step of the backbone changes the source answers"):
        card = fast.SourceCard.estimate(model, X, num_samples=8, calibration_samples=4)
    assert card.mean < 1e-12
    assert card.forecast(p for n, p in model.named_parameters() if n in card.entries) == 0
    unlabelled, backbone = [(X, None)], list(card.entries)
    for kind in (GGN, Fisher):
        operator = kind(model, F.cross_entropy, unlabelled, backbone)
        assert float(operator.trace(num_matvecs=6)) < 1e-12
    for method in ("samples", "signs"):
        diagonal = fisher_diagonal(model, F.cross_entropy, unlabelled, backbone, method=method)
        assert max(float(d.max()) for d in diagonal.values()) < 1e-12


def test_without_a_linear_head_labels_have_to_tell() -> None:
    """Two orders are possible, and a guess would be wrong in silence."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return torch.tanh(net.first(x)) @ net.table.T

    model = Net(forward, first=linear(4, 4), table=nn.Parameter(torch.ones(6, 4).double()))
    for unlabelled in (
        lambda: GGN(model, F.cross_entropy, [(X, None)]).trace(num_matvecs=6),
        lambda: fisher_diagonal(model, F.cross_entropy, X),
    ):
        with pytest.raises(ValueError, match=r"logits are \[8, 5, 6\], .* has no linear head"):
            unlabelled()
    with pytest.raises(ValueError, match="has no linear head"):
        fast.SourceCard.estimate(model, X, num_samples=8, calibration_samples=4)
    labelled = (X, torch.zeros(8, 5).long())
    first = GGN(model, F.cross_entropy, labelled, "first.*")
    assert float(first.trace(num_matvecs=6)) < 1e-12


@pytest.mark.parametrize("classes", [6, 5])
def test_a_card_of_tokens_is_that_of_the_tokens_as_samples(classes: int) -> None:
    """Among others, with as many classes as tokens."""
    model, flat = tokens(classes), X.flatten(0, 1)
    truth = GGN(model, F.cross_entropy, (flat, torch.zeros(40).long()), "first.*")
    diagonal = truth.dense().diag()
    often = X.repeat(300, 1, 1)
    card = fast.SourceCard.estimate(model, often, temperature=1.0, num_samples=2400)
    estimate = torch.cat([d.flatten() for d in card.diagonal().values()])
    assert relative(estimate, diagonal) < 0.1
    signs = fisher_diagonal(
        model, F.cross_entropy, [(X, None)], "first.*", method="signs", num_draws=1500
    )
    assert relative(torch.cat([d.flatten() for d in signs.values()]), diagonal) < 0.1


@pytest.mark.parametrize("form", ["last", "second", "maps"])
def test_products_of_dense_answers(form: str) -> None:
    model = {"last": tokens, "second": lambda: transposed(tokens()), "maps": maps}[form]()
    z = model(X)
    rows = z if form == "last" else z.movedim(1, -1)
    y = torch.randint(0, 6, rows.shape[:-1], generator=torch.Generator().manual_seed(2))
    y[0, 0] = -100

    def plain(z: Tensor, y: Tensor) -> Tensor:
        z = z if form == "last" else z.movedim(1, -1)
        return F.cross_entropy(z.flatten(0, -2), y.flatten())

    for kind in (Hessian, GGN):
        truth = kind(model, plain, (X, y)).dense()
        for method in ("auto", "loop"):
            operator = kind(model, F.cross_entropy, (X, y), method=method)
            assert relative(operator.dense(), truth) < 1e-10
            assert operator.check().ok
    unlabelled = GGN(model, F.cross_entropy, (X, y.clamp(min=0))).trace(method="hutchinson").value
    sampled = Fisher(model, F.cross_entropy, [(X.repeat(200, 1, 1), None)]).trace(
        method="hutchinson"
    )
    assert sampled.value == pytest.approx(unlabelled, rel=0.1)


def test_soft_labels_of_tokens() -> None:
    model = tokens()
    y = torch.rand(8, 5, 6, dtype=torch.float64).softmax(-1)
    truth = Hessian(model, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(0, 1)), (X, y))
    assert relative(Hessian(model, F.cross_entropy, (X, y)).dense(), truth.dense()) < 1e-10


def test_labels_decide_where_both_would_do() -> None:
    """What torch itself takes stays what it is: [N, C, L] with labels [N, L]."""
    model = Net(lambda net, x: net.out(x), out=linear(4, 3))
    y = torch.randint(0, 5, (8, 3), generator=torch.Generator().manual_seed(3))
    truth = Hessian(model, lambda z, y: F.cross_entropy(z, y), (X, y)).dense()
    assert relative(Hessian(model, CrossEntropy(), (X, y)).dense(), truth) < 1e-10


def test_answers_and_their_divergence() -> None:
    model, other = tokens(), tokens()
    with torch.no_grad():
        other.first.weight += 0.3
    data = SourceInputs.parse(X, 8)
    before, now = source_logits(model, data), source_logits(other, data)
    assert before.shape == (8, 6, 5)
    p, q = (net(X).detach().float().double().log_softmax(-1) for net in (model, other))
    truth = (p.exp() * (p - q)).sum(-1).mean()
    assert float(divergence(before, now)) == pytest.approx(float(truth), rel=1e-5)
    assert float(expected_rise(before, now)) > 0
    assert torch.equal(source_logits(transposed(model), data), before)


def test_accuracy_and_loss_of_token_labels() -> None:
    model = tokens()
    y = model(X).argmax(-1)
    y[:, 0] = -100
    card = fast.SourceCard.estimate(model, {"x": X, "labels": y}, num_samples=8)
    assert card.source_accuracy == 1
    truth = F.cross_entropy(model(X).flatten(0, 1), y.flatten())
    assert card.source_loss == pytest.approx(float(truth.detach()), rel=1e-5)


def test_soft_labels_that_sum_to_one_nowhere_have_their_classes_second() -> None:
    z = torch.zeros(1, 3, 3)
    y = torch.tensor([[[0.2, 0.2, 0.2], [0.1, 0.1, 0.4], [0.2, 0.2, 0.2]]])
    assert CrossEntropy().class_dim(z, y) == 1
    assert CrossEntropy().class_dim(z, y / 0.6) == 2
