"""Products on a CUDA device: what the networks of `curvature_cases` give on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from curvature_cases import NETWORKS, build
from fast.curvature import GGN, Hessian, SymmetricOperator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


# Dropout draws other masks there.
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "dropout"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_the_matrix_is_that_of_the_cpu(name, kind: type[SymmetricOperator], method) -> None:
    model, x, y = build(name)
    truth = kind(model, F.cross_entropy, (x, y), method="loop").dense()
    # From the start: recurrent layers keep flat weights of the device they were made on.
    model = build(name)[0].cuda()
    # The data may lie elsewhere than the network.
    found = kind(model, F.cross_entropy, (x, y), method=method).dense()
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), truth, rtol=1e-9, atol=1e-10)


def test_dropout_has_one_mask_and_random_state_stays() -> None:
    model, x, y = build("dropout")
    H = Hessian(model.cuda(), F.cross_entropy, (x.cuda(), y.cuda()))
    state = torch.cuda.get_rng_state()
    assert torch.equal(H.dense(), H.dense())
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_products_in_float32(kind: type[SymmetricOperator]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128), nn.SiLU(),
        nn.Linear(128, 10),
    )  # fmt: skip
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    size = sum(p.numel() for p in model.parameters())
    V = torch.randn(size, 8)
    truth = kind(model.double(), F.cross_entropy, (x.double(), y)) @ V.double()
    found = kind(model.float().cuda(), F.cross_entropy, (x.cuda(), y.cuda())) @ V.cuda()
    assert float((found.cpu() - truth).norm() / truth.norm()) < 1e-4


def test_a_card_and_top_eigenvalues() -> None:
    model, x, y = build("mlp-tanh", torch.float32)
    top = Hessian(model, F.cross_entropy, (x, y)).top(3).values
    there = Hessian(model.cuda(), F.cross_entropy, (x.cuda(), y.cuda())).top(3).values
    torch.testing.assert_close(there.cpu(), top, rtol=1e-3, atol=1e-6)
    card = fast.SourceCard.estimate(model, x.cuda().repeat(8, 1))
    assert card.mean > 0
