"""The record of a network as a program: it gives what a fresh record gives, or says why not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.cases import BY_LOOP, NETWORKS, build
from curvature.truth import Net, batch, linear, relative
from fast.curvature import GGN, Fisher, Hessian
from fast.curvature.products.programs.cached_record import TRACED_AT
from fast.curvature.products.programs.program import ProgramPasses

KINDS = (Hessian, GGN)


def _operator(kind, model: nn.Module, data: list, **options):
    """An operator that computes everything anew at each product."""
    return kind(model, F.cross_entropy, data, cache=False, **options)


def _products_of_new_batches(kind, model: nn.Module, count: int = 5):
    """Products with other data, parameters and vectors each time, beside those of the loop."""
    torch.manual_seed(0)
    data = [batch()]
    operator = _operator(kind, model, data)
    for _ in range(count):
        data[0] = torch.randn(7, 6).double(), torch.randint(0, 4, (7,))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        V = torch.randn(operator.shape[0], 3).double()
        product = operator @ V
        assert relative(product, _operator(kind, model, data, method="loop") @ V) < 1e-12
    return operator


def _is_replayed(operator, num_vectors: int = 3) -> bool:
    parts = [part for *_, part in operator.linearizations(num_vectors, operator.loss)]
    return all(isinstance(part, ProgramPasses) for part in parts)


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in BY_LOOP])
def test_programs_give_what_a_record_gives(name: str, kind) -> None:
    model, x, y = build(name)
    data = [(x, y)]
    operator = _operator(kind, model, data)
    V = torch.randn(operator.shape[0], 3, dtype=x.dtype)
    recorded, traced, replayed = (operator @ V for _ in range(3))
    torch.testing.assert_close(traced, recorded, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(replayed, recorded, rtol=1e-12, atol=1e-14)
    assert _is_replayed(operator)
    data[0] = (x + 0.1 if x.is_floating_point() else x.flip(0), y.flip(0))
    fresh = _operator(kind, model, data)
    torch.testing.assert_close(operator @ V, fresh @ V, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(operator.quad(V), fresh.quad(V), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_single_products_run_programs_too(kind) -> None:
    model, x, y = build("embedding")
    data = [(x, y)]
    operator = _operator(kind, model, data)
    v = torch.randn(operator.shape[0], dtype=x.dtype)
    for _ in range(3):
        product = operator @ v
    assert _is_replayed(operator, num_vectors=1)
    truth = _operator(kind, model, data, method="loop") @ v
    torch.testing.assert_close(product, truth, rtol=1e-12, atol=1e-14)


def _literal_in_place(net: Net, x: Tensor) -> Tensor:
    total = torch.tensor(0.0, dtype=torch.float64)
    total += x.sum()
    return net.a(x).tanh() * total


def _unused_random(net: Net, x: Tensor) -> Tensor:
    F.dropout(x, 0.5)  # the next mask depends on it
    return F.dropout(net.a(x), 0.5).tanh()


FOLLOWED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "mask": lambda net, x: net.a(x).masked_fill(x[:, :4] > 0, 0).tanh(),
    "indices": lambda net, x: net.a(x).tanh() * x.topk(4).values,
    "literal": lambda net, x: net.a(x).tanh() * torch.tensor([3.0, 2.0, 1.0, 1.0]).double(),
    "literal in place": _literal_in_place,
    "random": lambda net, x: net.a(x).tanh() * torch.rand(4, dtype=torch.float64),
    "unused random": _unused_random,
    "attribute": lambda net, x: net.a(x).tanh() * net.scale,
    "detached": lambda net, x: net.a(x).tanh() * net.a(x).detach(),
    "tied": lambda net, x: net.a(x).tanh() @ net.a.weight[:, :4],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOLLOWED)
def test_programs_follow_data_parameters_and_vectors(name: str, kind) -> None:
    model = Net(FOLLOWED[name], a=linear(6, 4))
    model.scale = torch.tensor(2.0, dtype=torch.float64)
    operator = _products_of_new_batches(kind, model)
    assert _is_replayed(operator)
    model.scale.add_(1)
    _products_of_new_batches(kind, model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_on_data_has_a_program_for_each_turn(kind) -> None:
    model = Net(lambda net, x: net.a(x).tanh() if x.sum() > 0 else net.a(x).sin(), a=linear(6, 4))
    operator = _products_of_new_batches(kind, model, 9)
    assert len(operator.programs) == 2
    assert _is_replayed(operator)


REFUSED: dict[str, tuple[str, Callable[[Net, Tensor], Tensor]]] = {
    "number": ("differs from batch to batch", lambda net, x: net.a(x).tanh() * float(x.max())),
    "tolist": ("reads data by tolist", lambda net, x: net.a(x).tanh() * x[0].tolist()[0]),
    "numpy": ("reads data by numpy", lambda net, x: net.a(x).tanh() * float(x.numpy().max())),
    "copy": (
        "reads data by tensor",
        lambda net, x: net.a(x).tanh() * torch.tensor([x[0, 0], 2.0, 1.0, 1.0]),
    ),
    "nonzero": ("aten.nonzero", lambda net, x: net.a(x).tanh() * len((x > 0).nonzero())),
    "selection": ("aten.index.Tensor", lambda net, x: net.a(x).tanh() * x[x > 0].sum()),
    "closure": ("no parameter, buffer", lambda net, x: net.a(x).tanh() * _SCALE),
}
_SCALE = torch.tensor(2.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_program_can_follow_is_recorded_anew(name: str, kind) -> None:
    reason, forward = REFUSED[name]
    operator = _products_of_new_batches(kind, Net(forward, a=linear(6, 4)), 7)
    assert not _is_replayed(operator)
    assert operator.explain().startswith("folded, ")
    assert f"each batch recorded anew: {operator.programs.why}" in operator.explain()
    assert reason in operator.programs.why


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_are_drawn_at_every_product(draw) -> None:
    x, y = batch()
    model = Net(lambda net, x: net.a(x).tanh() * draw(), a=linear(6, 4))
    operator = _operator(GGN, model, [(x, y)])
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    products = [operator @ v for _ in range(4)]
    assert not any(torch.equal(a, b) for a in products[:2] for b in products[2:])
    assert operator.programs.why == "the network draws random numbers that torch does not seed"


def test_a_network_that_counts_its_calls_is_recorded_anew() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        return net.a(x).tanh() * (1 + net.calls % 2)

    x, y = batch()
    operator = _operator(Hessian, Net(forward, a=linear(6, 4)), [(x, y)])
    V = torch.randn(operator.shape[0], 2).double()
    first, second, third, fourth = (operator @ V for _ in range(4))
    assert relative(first, second) > 0.1
    torch.testing.assert_close(third, first)
    torch.testing.assert_close(fourth, second)


def _mode(model: nn.Module) -> None:
    model.train(not model.training)


def _probability(model: nn.Module) -> None:
    model[2].p = 0.9


def _part(model: nn.Module) -> None:
    model[3] = nn.Sigmoid()


def _hook(model: nn.Module) -> None:
    model[0].register_forward_hook(lambda m, args, out: 3 * out)


def _parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())


def _storage(model: nn.Module) -> None:
    model[0].weight.data = (2 * model[0].weight.detach()).t().contiguous().t()


def _buffer(model: nn.Module) -> None:
    model[1].running_var *= 3


def _new_buffer(model: nn.Module) -> None:
    model[1].running_var = 3 * model[1].running_var


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", [_mode, _probability, _part, _hook, _parameter, _storage, _buffer, _new_buffer]
)
def test_programs_see_changes_of_the_model(change: Callable[[nn.Module], None], kind) -> None:
    torch.manual_seed(0)
    x, y = batch()
    norm = nn.BatchNorm1d(5, dtype=torch.float64)
    model = nn.Sequential(linear(6, 5), norm, nn.Dropout(0.5), nn.Tanh(), linear(5, 4))
    norm.eval()
    operator = _operator(kind, model, [(x, y)])
    V = torch.randn(operator.shape[0], 2).double()
    before = [operator @ V for _ in range(3)][-1]
    assert _is_replayed(operator, 2)
    change(model)
    truth = _operator(kind, model, [(x, y)]) @ V
    assert relative(before, truth) > 1e-3
    for _ in range(3):
        torch.testing.assert_close(operator @ V, truth)


def test_one_dropout_mask_per_operator_and_batch() -> None:
    model, x, y = build("dropout")
    batches = [(x, y), (x + 1, y), (x - 1, y), (x * 2, y)]
    operators = [_operator(GGN, model, batches, seed=seed) for seed in (3, 3, 4)]
    V = torch.randn(operators[0].shape[0], 2, dtype=x.dtype)
    first = operators[0] @ V
    assert _is_replayed(operators[0], 2)
    torch.testing.assert_close(operators[0] @ V, first, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(operators[1] @ V, first, rtol=1e-12, atol=1e-14)
    assert relative(operators[2] @ V, first) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_several_shapes_and_chunks(kind) -> None:
    model, x, y = build("encoder-layer")
    sizes = (2, 3, 2, 3, 5, 3, 2)
    batches = [(x[:n] * (1 + 0.1 * i), y[:n]) for i, n in enumerate(sizes)]
    operator = _operator(kind, model, batches, chunk=2)
    V = torch.randn(operator.shape[0], 5, dtype=x.dtype)
    truth = _operator(kind, model, batches, method="loop") @ V
    for _ in range(3):
        assert relative(operator @ V, truth) < 1e-11
    assert len(operator.programs) == 3
    assert relative(operator @ V[:, :3], truth[:, :3]) < 1e-11


def test_one_tensor_twice_is_not_two_tensors() -> None:
    model = Net(lambda net, x: net.a(x[:, :6]).tanh(), a=linear(6, 4))
    model.forward = lambda a, b: (model.a(a) * model.a(b)).tanh()
    (x, y), other = batch(), torch.randn(7, 6).double()
    data = [((x, x), y)]
    operator = _operator(GGN, model, data)
    V = torch.randn(operator.shape[0], 2).double()
    for _ in range(3):
        operator @ V
    data[0] = ((x, other[: len(x)]), y)
    torch.testing.assert_close(operator @ V, _operator(GGN, model, data) @ V)


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in BY_LOOP])
def test_passes_of_a_kept_batch_become_code_that_gives_the_same(name: str, kind) -> None:
    model, x, y = build(name)
    operator = kind(model, F.cross_entropy, (x, y), chunk=2)
    V = torch.randn(operator.shape[0], 3, dtype=x.dtype)  # a pass with two, and one with one
    product, form = operator @ V, operator.quad(V)
    for _ in range(TRACED_AT):
        torch.testing.assert_close(operator @ V, product, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(operator.quad(V), form, rtol=1e-12, atol=1e-14)
    code = {("product", 2), ("product", 1), ("form", 2), ("form", 1)}
    assert set(operator._cache[1].executions) == code
    W = torch.randn_like(V)
    fresh = _operator(kind, model, [(x, y)], chunk=2)
    torch.testing.assert_close(operator @ W, fresh @ W, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(operator.quad(W), fresh.quad(W), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_any_strides(kind) -> None:
    model, x, y = build("mlp-tanh")
    operator = _operator(kind, model, [(x, y)])
    V = {n: torch.randn(*p.shape, 3).to(p).movedim(-1, 0) for n, p in model.named_parameters()}
    products = [operator @ V for _ in range(3)]
    assert _is_replayed(operator)
    torch.testing.assert_close(products[2], products[0])


def test_a_kept_batch_serves_every_number_of_vectors() -> None:
    model, x, y = build("mlp-tanh")
    operator = Hessian(model, F.cross_entropy, (x, y))
    truth = operator.dense()
    V = torch.randn(operator.shape[0], 4, dtype=x.dtype)
    for step in range(4):  # the weights move, so that nothing of the batch is kept
        with torch.no_grad():
            model[0].bias.add_(0.1 * step)
        truth = _operator(Hessian, model, [(x, y)]).dense()
        torch.testing.assert_close(operator @ V, truth @ V)
    assert isinstance(operator._cache[1], ProgramPasses)
    torch.testing.assert_close(operator @ V[:, :3], truth @ V[:, :3])
    kept = operator._cache
    torch.testing.assert_close(operator @ V, truth @ V)
    assert operator._cache is kept


def test_a_closure_needs_a_refresh() -> None:
    options = {"scale": 1.0}
    x, y = batch()
    model = Net(lambda net, x: net.a(x).mul(options["scale"]).sin(), a=linear(6, 4))
    operator = _operator(GGN, model, [(x, y)])
    V = torch.randn(operator.shape[0], 2).double()
    for _ in range(3):
        operator @ V
    options["scale"] = 2.0
    operator.refresh()
    torch.testing.assert_close(operator @ V, _operator(GGN, model, [(x, y)]) @ V)
