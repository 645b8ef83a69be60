"""Products on batches that come anew, on networks so small that only overhead counts.

    python -m benchmarks.curvature.new_batch --save

Every round times one gradient and each method once, one after the other, in processor seconds of
one thread: figures are medians of the ratios to the gradient of the same round. A cached batch is
multiplied with again; on a new one everything is computed anew. Every product is compared with
that of vmap first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS, Record, commit, machine, save, table
from benchmarks.curvature import methods
from benchmarks.curvature.networks import Problem, ResNet20, ViT, ViTBlock
from fast.curvature import GGN, Hessian


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


NETWORKS: dict[str, Callable[[], Problem]] = {
    "12 transformer blocks": encoder,
    "ResNet-20, width 4": resnet,
    "12 GPT-2 blocks": decoder,
}
VMAP = {Hessian: "vmap(jvp(grad))", GGN: "vmap(jvp, vjp)"}


def measure(name: str, kind: type[Hessian | GGN], count: int, rounds: int) -> Record:
    """Medians of the methods, in gradients."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[name]()
    model.eval()
    vectors = methods.probes(model, count)
    new = kind(model, F.cross_entropy, (x, y), cache=False)
    cached = kind(model, F.cross_entropy, (x, y))
    which = kind.__name__.lower()
    runs = {
        "new": lambda: new @ vectors,
        "cached": lambda: cached @ vectors,
        "vmap": methods.METHODS[which][VMAP[kind]](model, x, y, vectors),
    }
    truth = runs["vmap"]()
    for method in ("new", "cached"):
        for _ in range(3):  # recorded, traced, run
            error = methods.difference(runs[method](), truth)
        assert error < 1e-4, (name, which, method, error)
    gradient = methods.gradient(model, x, y)
    ratios: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(rounds):
        one = _seconds(gradient)
        for method, run in runs.items():
            ratios[method].append(_seconds(run) / one)
    row: Record = {"network": name, "matrix": which, "K": count}
    row |= {method: statistics.median(r) for method, r in ratios.items()}
    pairs = zip(ratios["new"], ratios["vmap"], strict=True)
    return row | {"new / vmap": statistics.median(a / b for a, b in pairs)}


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/new-batch.*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in NETWORKS:
        for kind in (GGN, Hessian):
            for count in (1, 8):
                rows.append(measure(name, kind, count, arguments.rounds))
                print(rows[-1], flush=True)
    if arguments.save:
        data = {"commit": commit(), "machine": machine(), "rows": rows}
        (RESULTS / "new-batch.json").write_text(json.dumps(data, indent=1) + "\n")
        cells = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
        save("new-batch", [__doc__ or "", *table(cells), "", f"{data['machine']}; {commit()}"])


if __name__ == "__main__":
    main()
