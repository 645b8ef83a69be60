"""Per-sample gradients of networks whose forward pass reads a value of its inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fast.curvature import fisher_diagonal
from networks import TextNet, sentences


class CutsToLongest(TextNet):
    """Drops the padding that all of a batch have: `int(...)` is what vmap refuses."""

    def forward(self, ids, mask):
        longest = int(mask.sum(1).max())
        return super().forward(ids[:, :longest], mask[:, :longest])


def test_a_forward_pass_that_reads_a_value_gives_the_same_diagonal():
    torch.manual_seed(0)
    plain, cutting = TextNet().eval(), CutsToLongest().eval()
    cutting.load_state_dict(plain.state_dict())
    inputs, y = sentences(12, 5, 1)

    def diagonal(model):
        net = torch.nn.Module()
        net.model = model
        net.forward = lambda ids, mask: model(ids, mask).logits
        return fisher_diagonal(net.eval(), F.cross_entropy, [((inputs["ids"], inputs["mask"]), y)])

    expected, result = diagonal(plain), diagonal(cutting)
    assert all(torch.allclose(result[n], expected[n], rtol=1e-5, atol=1e-9) for n in expected)
    assert any(v.abs().sum() > 0 for v in result.values())
