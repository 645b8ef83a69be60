"""Networks of the curvature benchmark, each with a batch: `build(case)`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_pairs import real_pair

Problem = tuple[nn.Module, Tensor, Tensor]  # network, inputs, labels


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """The CIFAR network of He et al. 2016 (width 16), batch norm in eval mode."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
        self.conv, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, 1 + (a != b)) for a, b in pairs))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


class ViT(nn.Module):
    """Tokens [N, T, inputs] are embedded, a class token leads; torch's default attention, heads of
    64. By default width 192, 6 layers, 3 heads, 65 tokens."""

    def __init__(
        self,
        width: int = 192,
        depth: int = 6,
        tokens: int = 64,
        inputs: int = 48,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.blocks = nn.Sequential(*(ViTBlock(width) for _ in range(depth)))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        return self.fc(self.norm(self.blocks(x))[:, 0])


class ViTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(a)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MiniLM(nn.Module):
    """The shape of all-MiniLM-L6-v2 (a BERT of 6 layers) with a mean-pooled sentence vector and a
    head, in torch's own encoder layers. Inputs [N, 2, T]: token ids and mask, which pads a sixth.
    """

    vocabulary, tokens = 30522, 32

    def __init__(self, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(self.vocabulary, width), nn.Embedding(512, width)
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        ids, mask = x.unbind(1)
        h = self.norm(self.token(ids) + self.position.weight[: ids.shape[1]])
        h = self.encoder(h, src_key_padding_mask=mask == 0)
        weight = mask[..., None].to(h)
        return self.fc((h * weight).sum(1) / weight.sum(1))


class Packed(nn.Module):
    """A network of two inputs as one of [N, 2, T]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(*x.unbind(1))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def _random(
    network: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, classes: int
) -> Callable[[], Problem]:
    return lambda: (network(), torch.randn(batch, *shape), torch.randint(0, classes, (batch,)))


def _minilm() -> Problem:
    """The trained network on SST-2 if FAST_DATA names the data folder of `real_pairs.py`; otherwise
    its shape with random weights on random tokens, which takes as long."""
    if "FAST_DATA" in os.environ:
        real = real_pair("minilm -> sst2", Path(os.environ["FAST_DATA"]))
        x, y = real.train
        packed = torch.stack([x["ids"], x["mask"]], 1)[:16, :, : MiniLM.tokens]
        return Packed(real.model), packed, y[:16]
    ids = torch.randint(1, MiniLM.vocabulary, (16, MiniLM.tokens))
    lengths = torch.randint(2 * MiniLM.tokens // 3, MiniLM.tokens + 1, (16, 1))
    mask = (torch.arange(MiniLM.tokens) < lengths).long()
    return MiniLM(), torch.stack([ids * mask, mask], 1), torch.randint(0, 2, (16,))


CASES: dict[str, Callable[[], Problem]] = {
    "mlp": _random(_mlp, (784,), 512, 10),
    "head": _random(lambda: nn.Sequential(nn.Linear(768, 1000)), (768,), 1024, 1000),
    "resnet20": _random(ResNet20, (3, 32, 32), 128, 10),
    "vit": _random(ViT, (64, 48), 64, 10),
    "minilm": _minilm,
}


def build(case: str) -> Problem:
    """In eval mode, batch norm with statistics of the batch; the same every time."""
    torch.manual_seed(0)
    model, x, y = CASES[case]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x, y
