"""Small networks of every kind that the trainer and the curvature tools must handle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Batch norm, ReLU, a linear head under an unusual name behind a hidden linear layer."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.project = nn.Linear(32, 16)
        self.decide = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(torch.relu(self.project(self.features(x).flatten(1))))


class ConvHead(nn.Module):
    """No norm layer; a 1x1 convolution, then global pooling, makes the logits (SqueezeNet, FCN)."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), nn.GELU())
        self.spread = nn.Conv2d(16, 16, 2)
        self.classifier = nn.Conv2d(16, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.spread(self.body(x)))).mean((2, 3))


class SequentialHead(nn.Module):
    """VGG's way: the classifier is a stack that ends in the head."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


class SharedHead(nn.Module):
    """One head, registered under two names and used through the second."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.fc = nn.Linear(16, num_classes)
        self.branches = nn.ModuleList([self.fc])

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[0](self.body(x))


class TextNet(nn.Module):
    """Layer norm, two named inputs, an output object with `logits`, as transformers has it."""

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.num_labels = num_classes
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.body = nn.Linear(16, 16)
        self.score = nn.Linear(16, num_classes)

    def forward(self, ids: Tensor, mask: Tensor) -> TextNet.Output:
        x = self.norm(self.embed(ids) + torch.tanh(self.body(self.embed(ids))))
        weight = mask[..., None].to(x.dtype)
        return self.Output(self.score((x * weight).sum(1) / weight.sum(1)))


IMAGE_NETWORKS = {
    "conv, batch norm": ConvNet,
    "conv head": ConvHead,
    "sequential head": SequentialHead,
    "shared head": SharedHead,
}


def images(n: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """8x8 images `[N, 1, 8, 8]` whose class is where the bright blob is."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(num_classes, (n,), generator=generator)
    x = torch.randn(n, 1, 8, 8, generator=generator) * 0.3
    for i, c in enumerate(y.tolist()):
        row, column = divmod(c * 7, 6)
        x[i, 0, row % 6 : row % 6 + 3, column : column + 3] += 1.0
    return x, y


def sentences(n: int, num_classes: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids and masks `[N, 6]`; the class is the most frequent token's remainder."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(num_classes, (n,), generator=generator)
    ids = torch.randint(20, (n, 6), generator=generator)
    ids[:, :3] = y[:, None]
    mask = torch.ones(n, 6, dtype=torch.int64)
    mask[:, 5] = torch.randint(2, (n,), generator=generator)
    return {"ids": ids, "mask": mask}, y


def taught(x: Tensor, y: Tensor, rounds: int) -> ConvNet:
    """A `ConvNet` in evaluation mode that has learned these samples, in batches of 100."""
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for index in torch.arange(len(y)).repeat(rounds).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()
