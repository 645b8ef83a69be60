"""Tiny networks, one per feature that breaks curvature tools, and explicit matrices to judge by."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

FEATURES, CLASSES, BATCH = 6, 4, 5


class Attention(nn.Module):
    def __init__(self, causal: bool = False):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(6, 18), nn.Linear(6, CLASSES), causal

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.flip(1), x * x], 1)
        q, k, v = self.qkv(tokens).view(len(x), 3, 3, 2, 3).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(a.transpose(1, 2).reshape(len(x), 3, 6).mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(torch.stack([x, x.flip(1)], 1)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.view(-1, 2, 3))[0][:, -1])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True, bidirectional=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.view(-1, 2, 3))[0].mean(1))


class Padded(nn.Module):
    """An encoder that may not look at padding: a boolean mask of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.stack([x[:, 0] > 9, x[:, 1] > 0, x[:, 2] > 0.5], 1)
        tokens = torch.stack([x, x.flip(1), x * x], 1)
        h = self.layer(tokens, src_key_padding_mask=padding)
        return self.out(h.masked_fill(padding[..., None], 0.0).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(6, 5), nn.Linear(5, CLASSES), reentrant
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.enabled:
            h = checkpoint(self._segment, h, use_reentrant=self.reentrant)
        else:
            h = self._segment(h)
        return self.second(h)

    def _segment(self, h: Tensor) -> Tensor:
        return F.gelu(h).sin()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle, self.out = nn.Linear(3, 2), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).tanh()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        h = h * 2
        h += 1
        buffer = x.new_zeros(len(x), 5)
        buffer[:, 1:] = h[:, :-1]
        return self.out(buffer.sin())


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        with torch.no_grad():
            scale = h.abs().mean(1, keepdim=True)
        return self.out(h * h.detach().exp() / scale)


class Conv(nn.Module):
    def __init__(self, norm: nn.Module | None = None, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.pool = norm or nn.Identity(), pool or nn.Identity()
        self.conv = nn.Conv2d(1, 4, 2, padding=1, stride=1)
        self.deep = nn.Conv2d(4, 4, 2, groups=2, stride=2, bias=False)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(torch.relu(self.norm(self.conv(x.view(-1, 1, 2, 3)))))
        return self.out(self.deep(F.pad(h, (0, 1, 0, 1))).flatten(2).mean(2))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed((x.abs() * 10).long() % 5).mean(1).tanh())


def _mlp(*middle: nn.Module, width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), *middle, nn.Linear(width, CLASSES))


def _train(model: nn.Module) -> nn.Module:
    return model.train()


def _with_statistics(model: nn.Module) -> nn.Module:
    """Eval-mode batch norm with statistics of its own, not zeros and ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp-tanh": lambda: _mlp(nn.Tanh(), nn.Linear(5, 5), nn.Sigmoid()),
    "mlp-relu": lambda: _mlp(nn.ReLU(), nn.Linear(5, 5), nn.ReLU(inplace=True)),
    "activations": lambda: _mlp(
        nn.GELU(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 5), nn.GELU("tanh"), nn.Linear(5, 5),
        nn.Softplus(), nn.LeakyReLU(), nn.Hardtanh(), nn.ReLU6(), nn.Hardswish(),
    ),
    "elu": lambda: _mlp(nn.ELU(), nn.Linear(5, 5), nn.CELU()),
    "softmax": lambda: _mlp(nn.Softmax(-1), nn.Linear(5, 5), nn.LogSoftmax(-1)),
    "layer-norm": lambda: _mlp(nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5)),
    "layer-norm-plain": lambda: _mlp(nn.LayerNorm(5, elementwise_affine=False)),
    "rms-norm": lambda: _mlp(nn.RMSNorm(5)),
    "group-norm": lambda: Conv(nn.GroupNorm(2, 4)),
    "batch-norm-eval": lambda: _with_statistics(Conv(nn.BatchNorm2d(4))),
    "batch-norm-train": lambda: _train(_mlp(nn.BatchNorm1d(5), nn.Tanh())),
    "batch-norm-2d-train": lambda: _train(Conv(nn.BatchNorm2d(4))),
    "dropout": lambda: _train(_mlp(nn.Dropout(0.5), nn.Tanh())),
    "conv": lambda: Conv(),
    "max-pool": lambda: Conv(pool=nn.MaxPool2d(2, 1)),
    "average-pool": lambda: Conv(pool=nn.AvgPool2d(2, 1)),
    "adaptive-pool": lambda: Conv(pool=nn.AdaptiveAvgPool2d((2, 2))),
    "attention": Attention,
    "attention-causal": lambda: Attention(causal=True),
    "encoder-layer": Encoder,
    "encoder-layer-train": lambda: _train(Encoder()),
    "lstm": Recurrent,
    "gru": Gated,
    "padding-mask": Padded,
    "checkpoint": lambda: Checkpointed(False),
    "checkpoint-reentrant": lambda: Checkpointed(True),
    "tied": Tied,
    "unused": Unused,
    "in-place": InPlace,
    "detached": Detached,
    "embedding": Tokens,
}  # fmt: skip

# Networks with an operation that has no rule: these take the loop.
BY_LOOP = {"elu", "lstm", "gru", "in-place"}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, x [5, 6], labels [5]); the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        model = NETWORKS[name]()
        if not name.endswith("train") and name != "dropout":
            model.eval()
        x, y = torch.randn(BATCH, FEATURES), torch.randint(0, CLASSES, (BATCH,))
    return model.to(dtype), x.to(dtype), y


def loss_at(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], seed: int = 0
) -> Callable[[dict[str, Tensor]], Tensor]:
    """params -> loss, by plain means: no fused attention, no checkpoint, the mask of `seed`."""
    buffers = dict(model.named_buffers())

    def value(params: dict[str, Tensor]) -> Tensor:
        copies = {n: b.clone() for n, b in buffers.items()}
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(seed)
            return loss(functional_call(model, {**params, **copies}, x))

    return value


def flat_gradient(
    loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], graph: bool = False
) -> tuple[Tensor, list[Tensor]]:
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    grads = torch.autograd.grad(
        loss(leaves), list(leaves.values()), create_graph=graph, allow_unused=True
    )
    rows = [
        (torch.zeros_like(p) if g is None else g).reshape(-1)
        for g, p in zip(grads, leaves.values(), strict=True)
    ]
    return torch.cat(rows), list(leaves.values())


def explicit_hessian(
    loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]
) -> Tensor:
    """[P, P], row by row: every entry of the gradient differentiated on its own."""
    gradient, leaves = flat_gradient(loss, params, graph=True)
    return torch.stack([_row(g, leaves) for g in gradient])


def explicit_jacobian(
    outputs: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]
) -> Tensor:
    """[outputs, P], row by row."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    z = outputs(leaves).reshape(-1)
    return torch.stack([_row(entry, list(leaves.values())) for entry in z])


def _row(entry: Tensor, leaves: list[Tensor]) -> Tensor:
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if entry.requires_grad:
        grads = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for g, p in zip(grads, leaves, strict=True)
        ]
    )


def difference(
    loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], v: Tensor
) -> Tensor:
    """Hessian times v by central differences of the gradient: no second derivatives at all."""
    names, shapes = list(params), [p.shape for p in params.values()]
    point = torch.cat([p.detach().reshape(-1) for p in params.values()])

    def gradient(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        moved = {n: t.reshape(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return flat_gradient(loss, moved)[0]

    h = 1e-5
    return (gradient(point + h * v) - gradient(point - h * v)) / (2 * h)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a product must not change."""
    return {
        "modes": [m.training for m in model.modules()],
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }
