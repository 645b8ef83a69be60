"""Products against explicit matrices in float64, on every feature that breaks curvature tools."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.cases import (
    NETWORKS,
    build,
    difference,
    explicit_hessian,
    explicit_jacobian,
    loss_at,
    snapshot,
)
from curvature.truth import explicit_ggn, relative
from fast.curvature import GGN, Fisher, Hessian, SymmetricOperator
from fast.curvature.network.network import mask_seed

SEED = 3


def _plain(model: nn.Module) -> nn.Module:
    if hasattr(model, "enabled"):
        model.enabled = False
    return model


def _params(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _loss(model: nn.Module, x: Tensor, y: Tensor):
    return loss_at(model, x, lambda z: F.cross_entropy(z, y), mask_seed(SEED, 0))


def _explicit_ggn(model: nn.Module, x: Tensor) -> Tensor:
    return explicit_ggn(loss_at(model, x, lambda z: z, mask_seed(SEED, 0)), _params(model))


@pytest.mark.parametrize("method", ["loop", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_equals_the_explicit_matrix(name: str, method: str) -> None:
    model, x, y = build(name)
    truth = explicit_hessian(_loss(_plain(build(name)[0]), x, y), _params(model))
    product = Hessian(model, F.cross_entropy, (x, y), method=method, seed=SEED).dense()
    assert relative(product, truth) < 1e-10


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "detached"])
def test_hessian_agrees_with_differences_of_the_gradient(name: str) -> None:
    model, x, y = build(name)
    H = Hessian(model, F.cross_entropy, (x, y), seed=SEED)
    v = torch.randn(H.shape[0], dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    truth = difference(_loss(_plain(build(name)[0]), x, y), _params(model), v)
    assert relative(H @ v, truth) < 1e-5


@pytest.mark.parametrize("method", ["loop", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_ggn_equals_the_explicit_matrix(name: str, method: str) -> None:
    model, x, y = build(name)
    truth = _explicit_ggn(_plain(build(name)[0]), x)
    G = GGN(model, F.cross_entropy, (x, y), method=method, seed=SEED)
    assert relative(G.dense(), truth) < 1e-10
    v = torch.randn(G.shape[0], 3, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(G.quad(v), (v * (truth @ v)).sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("name", NETWORKS)
def test_products_leave_no_trace(name: str, kind: type[SymmetricOperator]) -> None:
    model, x, y = build(name)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    operator = kind(model, F.cross_entropy, [(x, y), (x + 1, y)])
    operator @ torch.ones(operator.shape[0], dtype=x.dtype)
    after = snapshot(model)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_fisher_with_the_labels_of_the_data() -> None:
    model, x, y = build("mlp-tanh")
    grads = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows = torch.autograd.grad(loss, list(model.parameters()))
        grads.append(torch.cat([g.reshape(-1) for g in rows]))
    per_sample = torch.stack(grads)
    product = Fisher(model, F.cross_entropy, (x, y), kind="empirical").dense()
    assert relative(product, per_sample.T @ per_sample / len(x)) < 1e-12


def test_fisher_with_sampled_labels_converges_to_the_ggn() -> None:
    model, x, y = build("mlp-tanh")
    truth = GGN(model, F.cross_entropy, (x, y)).dense()
    many = [(x, y)] * 400
    assert relative(Fisher(model, F.cross_entropy, many).dense(), truth) < 0.1


def test_batches_are_weighted_by_their_samples() -> None:
    model, x, y = build("mlp-tanh")
    whole = Hessian(model, F.cross_entropy, (x, y)).dense()
    parts = Hessian(model, F.cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])]).dense()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([1.0, 2.0, 0.5, 3.0])),
        nn.MSELoss(),
        nn.MSELoss(reduction="sum"),
        lambda z, y: F.huber_loss(z.sin(), y),
    ],
    ids=["smoothing", "weights", "ignore", "sum", "mse", "mse-sum", "any"],
)
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_losses_and_their_denominators(kind: type[SymmetricOperator], loss_fn) -> None:
    model, x, y = build("mlp-tanh")
    classes = isinstance(loss_fn, nn.CrossEntropyLoss)
    if classes:
        loss_fn = loss_fn.double()
        y = torch.tensor([0, 1, 1, 3, 2])
    else:
        y = torch.randn(5, 4, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    params = _params(model)
    if kind is Hessian:
        truth = explicit_hessian(loss_at(model, x, lambda z: loss_fn(z, y)), params)
    else:
        outputs = loss_at(model, x, lambda z: z)
        z = outputs(params).detach()
        inner = explicit_hessian(lambda p: loss_fn(p["z"], y), {"z": z})
        jacobian = explicit_jacobian(outputs, params)
        truth = jacobian.T @ inner @ jacobian
    reduction = "sum" if getattr(loss_fn, "reduction", "mean") == "sum" else "mean"
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    product = kind(model, loss_fn, batches, reduction=reduction).dense()
    assert relative(product, truth) < 1e-10


def test_soft_labels_and_dense_predictions() -> None:
    model, x, _ = build("conv")
    soft = torch.softmax(torch.randn(5, 4, dtype=x.dtype), -1)
    truth = explicit_hessian(loss_at(model, x, lambda z: F.cross_entropy(z, soft)), _params(model))
    assert relative(Hessian(model, F.cross_entropy, (x, soft)).dense(), truth) < 1e-10

    pixels = nn.Conv2d(1, 3, 2).double()
    image, labels = torch.randn(2, 1, 4, 4).double(), torch.randint(0, 3, (2, 3, 3))
    labels[0, 0] = -100
    truth = explicit_hessian(
        loss_at(pixels, image, lambda z: F.cross_entropy(z, labels)), _params(pixels)
    )
    for kind in (Hessian, GGN):
        assert relative(kind(pixels, F.cross_entropy, (image, labels)).dense(), truth) < 1e-10


def test_forms_of_vectors_come_back_as_they_went_in() -> None:
    model, x, y = build("mlp-tanh")
    H = Hessian(model, F.cross_entropy, (x, y))
    truth = H.dense()
    V = torch.randn(H.shape[0], 3, dtype=x.dtype)
    torch.testing.assert_close(H @ V, truth @ V)
    torch.testing.assert_close(H @ V[:, 0], truth @ V[:, 0])
    assert (H @ V[:, :0]).shape == (H.shape[0], 0)
    named = {
        n: V.T[:, s].reshape(3, *p.shape)
        for (n, s), p in zip(H.space.slices().items(), model.parameters(), strict=True)
    }
    product = H @ named
    assert list(product) == [n for n, _ in model.named_parameters()]
    torch.testing.assert_close(H.space.join(list(product.values())).T, truth @ V)
    one = H @ {n: t[0] for n, t in named.items()}
    torch.testing.assert_close(H.space.join([t[None] for t in one.values()])[0], truth @ V[:, 0])
    out = torch.empty_like(V)
    assert H.matmat(V, out=out) is out
    torch.testing.assert_close(out, truth @ V)


def test_blocks_sums_and_damping() -> None:
    model, x, y = build("mlp-tanh")
    H, G = (kind(model, F.cross_entropy, (x, y)) for kind in (Hessian, GGN))
    truth = H.dense()
    where = H.space.slices()
    layers = H.blocks("layer")
    assert list(layers) == ["0", "2", "4"]
    rows = torch.cat([torch.arange(truth.shape[0])[where[n]] for n in ("2.weight", "2.bias")])
    torch.testing.assert_close(layers["2"].dense(), truth[rows][:, rows])
    torch.testing.assert_close(H.block(r".*bias").dense().shape, torch.Size([14, 14]))
    mixed = 2 * H - 0.5 * G
    torch.testing.assert_close(mixed.dense(), 2 * truth - 0.5 * G.dense())
    eye = torch.eye(H.shape[0], dtype=x.dtype)
    torch.testing.assert_close(H.damped(0.3).dense(), truth + 0.3 * eye)
    with pytest.raises(ValueError, match="different parameters"):
        H + layers["2"]


def test_compiled_model_is_differentiated_as_written() -> None:
    model, x, y = build("mlp-tanh")
    truth = Hessian(model, F.cross_entropy, (x, y)).dense()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(Hessian(compiled, F.cross_entropy, (x, y)).dense(), truth)
    model[0].compile(backend="eager")
    torch.testing.assert_close(Hessian(model, F.cross_entropy, (x, y)).dense(), truth)


def test_batches_of_many_shapes() -> None:
    model, x, y = build("mlp-tanh")
    truth = Hessian(model, F.cross_entropy, (x, y)).dense()
    for data in (
        [(x, y)],
        ((a, b) for a, b in [(x, y)]),
        {"input": x, "labels": y},
        ({"input": x}, y),
        ((x,), y),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2),
    ):
        H = Hessian(model, F.cross_entropy, data)
        for _ in range(2):
            torch.testing.assert_close(H.dense(), truth)
