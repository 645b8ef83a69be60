"""Networks so small that only overhead counts, each with a batch of two."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.curvature.networks import Problem, ResNet20, ViT, ViTBlock


class Decoder(nn.Module):
    """The blocks of a GPT-2: causal attention over tokens [N, T], the last one is classified."""

    def __init__(self, width: int = 64, depth: int = 12, vocabulary: int = 100, tokens: int = 16):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(CausalBlock(width) for _ in range(depth)))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight[: x.shape[1]]
        return self.fc(self.norm(self.blocks(h))[:, -1])


class CausalBlock(ViTBlock):
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def encoder() -> Problem:
    """12 transformer blocks of width 64."""
    return ViT(width=64, depth=12, tokens=15), torch.randn(2, 15, 48), torch.randint(0, 10, (2,))


def resnet() -> Problem:
    """A ResNet-20 whose layers are a quarter as wide."""
    return ResNet20(width=4), torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))


def decoder() -> Problem:
    return Decoder(), torch.randint(0, 100, (2, 16)), torch.randint(0, 100, (2,))


def mlp() -> Problem:
    """Three layers and 64 samples."""
    layers = nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
    return nn.Sequential(*layers), torch.randn(64, 784), torch.randint(0, 10, (64,))


def short_encoder() -> Problem:
    """Two transformer blocks of width 64."""
    return ViT(width=64, depth=2, tokens=15), torch.randn(2, 15, 48), torch.randint(0, 10, (2,))


NETWORKS: dict[str, Callable[[], Problem]] = {
    "12 transformer blocks": encoder,
    "ResNet-20, width 4": resnet,
    "12 GPT-2 blocks": decoder,
}
