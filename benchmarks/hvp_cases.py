"""Networks and methods of the curvature benchmark; each method is checked before it is timed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast.curvature import GGN, Hessian

Vectors = dict[str, Tensor]  # name -> [K, *shape]


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
    """The CIFAR network of He et al. 2016, batch norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, 1 + (a != b)) for a, b in pairs))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


class ViT(nn.Module):
    """Width 192, 6 layers, 3 heads, 65 tokens, torch's default attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(48, 192), nn.Parameter(0.02 * torch.randn(1, 1, 192))
        self.position = nn.Parameter(0.02 * torch.randn(1, 65, 192))
        self.blocks = nn.Sequential(*(ViTBlock() for _ in range(6)))
        self.norm, self.fc = nn.LayerNorm(192), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        return self.fc(self.norm(self.blocks(x))[:, 0])


class ViTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(192), nn.Linear(192, 576), nn.Linear(192, 192)
        self.norm2, self.up, self.down = nn.LayerNorm(192), nn.Linear(192, 768), nn.Linear(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, 3, 64).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(a)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


# name -> (network, shape of an input, batch, classes)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "mlp": (_mlp, (784,), 512, 10),
    "head": (lambda: nn.Sequential(nn.Linear(768, 1000)), (768,), 1024, 1000),
    "resnet20": (ResNet20, (3, 32, 32), 128, 10),
    "vit": (ViT, (64, 48), 64, 10),
}


def build(case: str) -> tuple[nn.Module, Tensor, Tensor]:
    network, shape, batch, classes = CASES[case]
    torch.manual_seed(0)
    model, x, y = network(), torch.randn(batch, *shape), torch.randint(0, classes, (batch,))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(x)  # statistics of its own for batch norm
    return model.eval(), x, y


def probes(model: nn.Module, count: int) -> Vectors:
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(count, *p.shape, generator=generator).to(p.dtype)
        for n, p in model.named_parameters()
    }


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    params = list(model.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), params)


def _ours(kind: type[Hessian | GGN], method: str):
    def prepare(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
        # cache=False: what the products share is computed, and counted, every time.
        operator = kind(model, F.cross_entropy, (x, y), method=method, cache=False)
        return lambda: operator @ vectors

    return prepare


def _kept_graph(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
    """Double backward in a loop, as a careful person writes it today."""
    params = list(model.parameters())

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model(x), y)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            count = len(next(iter(vectors.values())))
            rows = [
                torch.autograd.grad(
                    grads, params, [v[k] for v in vectors.values()], retain_graph=True
                )
                for k in range(count)
            ]
        return dict(zip(vectors, map(torch.stack, zip(*rows, strict=True)), strict=True))

    return run


def _vmap_hessian(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
    params = {n: p.detach() for n, p in model.named_parameters()}
    first = grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(lambda v: jvp(first, (params,), (v,))[1])(vectors)

    return run


def _vmap_ggn(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
    params = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(p: Vectors) -> Tensor:
        return functional_call(model, p, (x,))

    def run() -> Vectors:
        with sdpa_kernel(SDPBackend.MATH):
            z, pull = vjp(outputs, params)
            p = torch.softmax(z, -1)

            def product(v: Vectors) -> Vectors:
                u = jvp(outputs, (params,), (v,))[1]
                return pull(p * (u - (p * u).sum(-1, keepdim=True)) / len(x))[0]

            return vmap(product)(vectors)

    return run


def _curvlinops(kind: str):
    def prepare(model: nn.Module, x: Tensor, y: Tensor, vectors: Vectors):
        import curvlinops

        operator = getattr(curvlinops, f"{kind}LinearOperator")(
            model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(x, y)],
            check_deterministic=False,
        )  # fmt: skip
        stacked = [v.movedim(0, -1).contiguous() for v in vectors.values()]

        def run() -> Vectors:
            with sdpa_kernel(SDPBackend.MATH):
                out = operator @ stacked
            return {n: o.movedim(-1, 0) for n, o in zip(vectors, out, strict=True)}

        return run

    return prepare


METHODS = {
    "hessian": {
        "fast": _ours(Hessian, "auto"),
        "fast, loop": _ours(Hessian, "loop"),
        "kept-graph loop": _kept_graph,
        "vmap(jvp(grad))": _vmap_hessian,
        "curvlinops": _curvlinops("Hessian"),
    },
    "ggn": {
        "fast": _ours(GGN, "auto"),
        "fast, loop": _ours(GGN, "loop"),
        "vmap(jvp, vjp)": _vmap_ggn,
        "curvlinops": _curvlinops("GGN"),
    },
}


def relative_error(case: str, kind: str, method: str) -> float:
    """Of one product in float64 on four samples, against the double backward or its GGN."""
    model, x, y = build(case)
    model, x, y = copy.deepcopy(model).double(), x[:4].double(), y[:4]
    vectors = probes(model, 2)
    truth_of = {"hessian": _kept_graph, "ggn": _ours(GGN, "loop")}[kind]
    truth = truth_of(model, x, y, vectors)()
    product = METHODS[kind][method](model, x, y, vectors)()
    error = sum(float((product[n] - t).square().sum()) for n, t in truth.items())
    return (error / sum(float(t.square().sum()) for t in truth.values())) ** 0.5
