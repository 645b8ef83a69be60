"""What a product leaves alone, and what it refuses to be evaluated with."""

from __future__ import annotations

import ctypes
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.data import DataLoader, TensorDataset

from curvature.cases import build, snapshot
from curvature.truth import Net, batch, linear, relative, truths
from fast.curvature import GGN, Fisher, Hessian, Identity, keep_freed_memory
from fast.curvature.network.evaluation import evaluation
from fast.curvature.network.memory import empty_product


def _lookup(embedding: nn.Embedding) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.out(net.embed((x.abs() * 10).long() % 5).mean(1).tanh())

    return Net(forward, embed=embedding.double(), out=linear(6, 4))


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_weight_norm_has_true_second_derivatives(kind) -> None:
    torch.manual_seed(0)
    (x, y), wrapped = batch(), nn.utils.parametrizations.weight_norm(linear(6, 4))
    model = Net(lambda net, x: net.out(x).sin(), out=wrapped)

    def plain(net: Net, x: Tensor) -> Tensor:
        weight = net.v * (net.g / (net.v**2).sum(1, keepdim=True).sqrt())
        return (x @ weight.T + net.b).sin()

    parts = wrapped.parametrizations.weight
    same = Net(plain, b=wrapped.bias, g=parts.original0, v=parts.original1)
    truth = truths(same, x, y)[0 if kind is Hessian else 1]
    for method in ("auto", "loop"):
        product = kind(model, F.cross_entropy, (x, y), method=method).dense()
        assert relative(product, truth) < 1e-10


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_plain_attributes_stay() -> None:
    (x, y), layer = batch(), nn.utils.weight_norm(linear(6, 4))
    before = layer.weight
    Hessian(layer, F.cross_entropy, (x, y)).dense()
    assert layer.weight is before


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_sparse_embeddings_have_dense_products(kind) -> None:
    (x, y), plain = batch(), _lookup(nn.Embedding(5, 6))
    truth = kind(plain, F.cross_entropy, (x, y)).dense()
    plain.embed.sparse = True
    for method in ("auto", "loop"):
        product = kind(plain, F.cross_entropy, (x, y), method=method)
        assert relative(product.dense(), truth) < 1e-12
        assert product.gradient().shape == (truth.shape[0],)


def test_embeddings_that_write_or_scale_are_refused() -> None:
    x, y = batch()
    model = _lookup(nn.Embedding(5, 6, max_norm=0.5))
    before = model.embed.weight.detach().clone()
    H = Hessian(model, F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match=r"max_norm=0\.5 and rows that are longer"):
        H.dense()
    assert torch.equal(model.embed.weight, before)
    model(x)
    assert H.dense().isfinite().all()
    scaled = _lookup(nn.Embedding(5, 6, scale_grad_by_freq=True))
    with pytest.raises(ValueError, match="scale_grad_by_freq=True"):
        GGN(scaled, F.cross_entropy, (x, y)).dense()


def test_settings_of_threads_that_overlap() -> None:
    """The first to enter leaves last: what it finds is what it puts back."""
    fast, segment = torch.backends.mha.get_fastpath_enabled(), torch_checkpoint.CheckpointFunction
    flash = torch.backends.cuda.flash_sdp_enabled()
    from torch._dynamo.testing import CompileCounter  # loads the compiler: not for all tests

    counter = CompileCounter()
    entered, leave = threading.Event(), threading.Event()

    def inner() -> None:
        with evaluation(torch.device("cpu"), 0, differentiable_twice=True):
            entered.set()
            leave.wait(10)

    other = threading.Thread(target=inner)
    with evaluation(torch.device("cpu"), 0, differentiable_twice=True):
        other.start()
        assert entered.wait(10)
    assert not torch.backends.cuda.flash_sdp_enabled()  # the other one is still inside
    # A thread outside checkpoints as ever.
    h = torch.ones(2, requires_grad=True)
    out = torch_checkpoint.checkpoint(torch.sin, h, use_reentrant=True)
    assert "CheckpointFunction" in out.grad_fn.name()
    leave.set()
    other.join(10)
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch_checkpoint.CheckpointFunction is segment
    torch.compile(torch.sin, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1  # torch compiles again


def test_generators_of_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build("dropout")
    truth = Hessian(model, F.cross_entropy, (x, y)).dense()
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = snapshot(model)
    again = Hessian(model, F.cross_entropy, (x, y)).dense()
    assert not seeded
    torch.testing.assert_close(again, truth)
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("name", ["mlp-tanh", "batch-norm-eval", "lstm", "attention"])
@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_products_without_gradients_around_them(mode, kind, name: str, method: str) -> None:
    model, x, y = build(name)
    truth = kind(model, F.cross_entropy, (x, y), method=method).dense()
    gradient = kind(model, F.cross_entropy, (x, y)).gradient()
    with mode():
        operator = kind(model, F.cross_entropy, (x * 1, y), method=method)
        torch.testing.assert_close(operator.dense(), truth)
        torch.testing.assert_close(operator.gradient(), gradient)
        ones = torch.ones(len(truth), dtype=x.dtype)
        torch.testing.assert_close(operator.quad(ones), truth.sum())
        operator.explain()
        kept = kind(model, F.cross_entropy, (x, y), method=method)
        torch.testing.assert_close(kept.dense(), truth)
    torch.testing.assert_close(kept.dense(), truth)


def test_a_model_of_inference_mode_is_refused() -> None:
    x, y = batch()
    with torch.inference_mode():
        model = linear(6, 4)
    with pytest.raises(ValueError, match=r"'weight' was made under torch\.inference_mode"):
        Hessian(model, F.cross_entropy, (x, y))


def test_a_data_loader_draws_nothing_from_the_global_generator() -> None:
    model, x, y = build("mlp-tanh")
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    before = torch.get_rng_state()
    Hessian(model, F.cross_entropy, loader).dense()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
def test_malloc_is_changed_only_when_asked(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Libc:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            calls.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc)
    monkeypatch.setattr(sys, "platform", "linux")
    model, x, y = build("mlp-tanh")
    kind(model, F.cross_entropy, (x, y)).dense()
    assert not calls
    assert keep_freed_memory.__wrapped__()
    assert dict(calls) == {-3: 32 * 2**20, -1: 2**30}


def test_large_products_ask_for_the_large_pages_that_they_fill(monkeypatch) -> None:
    calls = []

    class Libc:
        @staticmethod
        def madvise(begin: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
            calls.append((begin.value, length.value, advice))
            return -1  # the kernel refuses, and nothing changes

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc)
    monkeypatch.setattr(sys, "platform", "linux")
    assert empty_product(torch.empty(3, 5).T).stride() == (3, 1)
    assert not calls
    out = empty_product(torch.empty(2**10 + 1, 2**13).T)
    assert out.is_contiguous()
    ((begin, length, advice),) = calls
    last = out.data_ptr() + out.numel() * out.element_size()
    assert begin % 2**21 == length % 2**21 == 0
    assert 0 <= begin - out.data_ptr() < 2**21
    assert 0 <= last - begin - length < 2**21
    assert advice == 14


def test_no_vectors_give_no_numbers() -> None:
    model, x, y = build("mlp-tanh")
    for kind in (Hessian, GGN, Fisher):
        operator = kind(model, F.cross_entropy, [(x, y), (x, y)])
        none = torch.zeros(operator.shape[0], 0, dtype=x.dtype)
        assert operator.quad(none).shape == (0,)
        assert (operator @ none).shape == none.shape
        assert (2 * operator.damped(0.1)).quad(none).shape == (0,)


def test_the_identity_shares_no_memory_with_its_input() -> None:
    model, x, y = build("mlp-tanh")
    eye = Identity(Hessian(model, F.cross_entropy, (x, y)).space)
    vectors = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    product = eye @ vectors
    product["0.bias"].zero_()
    assert bool((vectors["0.bias"] == 1).all())
