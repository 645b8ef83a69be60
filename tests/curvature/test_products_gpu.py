"""Products on a CUDA device: what the networks of `cases` give on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from curvature.cases import NETWORKS, build
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
    result = kind(model, F.cross_entropy, (x, y), method=method).dense()
    assert result.device.type == "cuda"
    # CUDA's hardswish divides by a 6 in float32, in float64 too.
    rtol, atol = (1e-6, 1e-7) if name == "activations" else (1e-9, 1e-10)
    torch.testing.assert_close(result.cpu(), truth, rtol=rtol, atol=atol)


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
    result = kind(model.float().cuda(), F.cross_entropy, (x.cuda(), y.cuda())) @ V.cuda()
    assert float((result.cpu() - truth).norm() / truth.norm()) < 1e-4


class Attending(nn.Module):
    """Heads of 64: CUDA's memory-efficient kernels take it in float32, and cuDNN the batch norm."""

    def __init__(self, causal: bool, masked: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv1d(8, 128, 1), nn.BatchNorm1d(128)
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 5)
        self.causal, self.masked = causal, masked

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x)).transpose(1, 2)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        mask = None
        if self.masked:
            keys = torch.arange(h.shape[1], device=x.device)
            mask = (keys < h.shape[1] - 2).expand(len(x), 1, 1, -1)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(a.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("train", [False, True])
def test_fused_attention_and_batch_norm_have_folded_rules(kind, causal, masked, train) -> None:
    torch.manual_seed(0)
    model = Attending(causal, masked).train(train)
    x, y = torch.randn(6, 8, 16), torch.randint(5, (6,))
    V = torch.randn(sum(p.numel() for p in model.parameters()), 3)
    truth = kind(copy.deepcopy(model).double(), F.cross_entropy, (x.double(), y)) @ V.double()
    operator = kind(model.cuda(), F.cross_entropy, (x.cuda(), y.cuda()))
    assert operator.explain().startswith("folded")
    result = operator @ V.cuda()
    assert float((result.cpu() - truth).norm() / truth.norm()) < 1e-4


def test_a_card_and_top_eigenvalues() -> None:
    model, x, y = build("mlp-tanh", torch.float32)
    top = Hessian(model, F.cross_entropy, (x, y)).top(3).values
    there = Hessian(model.cuda(), F.cross_entropy, (x.cuda(), y.cuda())).top(3).values
    torch.testing.assert_close(there.cpu(), top, rtol=1e-3, atol=1e-6)
    card = fast.SourceCard.estimate(model, x.cuda().repeat(8, 1))
    assert card.mean > 0
