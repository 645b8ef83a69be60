"""What else could hold the source: regularizers that are not in the package, in one plain loop.

    python -m benchmarks.experiments.regularizers --data FOLDER

All have the maximum-entropy head, frozen batch norm, stall, ramp and a cosine schedule as `fast`
has; none has distillation, rehearsal or averaging. Source inputs without labels serve the
curvature. The table has target and source accuracy at the end, on the first seed.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.common import Record, arguments, complete, machine, save, table
from benchmarks.real_pairs import RealPair, real_pair
from fast.curvature import GGN
from fast.data.dataset import as_data
from fast.data.stream import TrainBatches
from fast.data.trees import pick
from fast.heads import forward_logits, set_batch_norm, source_task
from fast.train.measure import evaluate

PAIRS = "resnet20 -> gtsrb,resnet20 -> sign_digits,mobilenet 0.25 -> flowers"
LR, HEAD_SCALE, STALL, RAMP = 1e-3, 10.0, 5, 30
MIXES = (0.25, 0.5, 0.75, 1.0)


class Pull:
    """The loop alone, and what a regularizer may change of it.

    Attributes:
        options: of the backbone's parameter group.
        params, anchors, before: the backbone's weights, at the start, and before the last step.
    """

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module, real: RealPair) -> None:
        self.params: list[Tensor] = []
        self.anchors: list[Tensor] = []
        self.before: list[Tensor] = []

    def start(self, params: list[nn.Parameter]) -> dict[str, Any]:
        """Takes the backbone's parameters at the pretrained weights; returns their group's
        options."""
        self.params = [p.detach() for p in params]
        self.anchors = [p.clone() for p in self.params]
        self.before = [p.clone() for p in self.params]
        return dict(self.options)

    def factor(self, logits: Tensor) -> float:
        """A factor on the backbone's learning rate of this step."""
        return 1.0

    def after_step(self, lr: float) -> None:
        """Called after the optimizer's step, which had this learning rate."""


def uniform(decay: float) -> type[Pull]:
    """L2-SP (arXiv 1802.01483), proximal."""
    return type("Uniform", (Pull,), {"options": {"anchor_decay": decay}})


def diagonal(decay: float, by_layer: bool = False) -> type[Pull]:
    """EWC (arXiv 1612.00796), proximal, by a card; or its mean over each tensor."""

    class Diagonal(Pull):
        def __init__(self, model: nn.Module, real: RealPair) -> None:
            super().__init__(model, real)
            self.card = fast.SourceCard.estimate(model, real.source_inputs)

        def start(self, params: list[nn.Parameter]) -> dict[str, Any]:
            F = self.card.curvature_for(params)
            if by_layer:
                F = [None if f is None else torch.full_like(f, float(f.mean())) for f in F]
            return super().start(params) | {"anchor_decay": decay, "curvature": F}

    return Diagonal


def low_rank(decay: float, rank: int) -> type[Pull]:
    """The card's diagonal, and along the top `rank` eigenvectors of the GGN a pull by their
    eigenvalue. Both are divided by the mean of the diagonal."""

    class LowRank(diagonal(decay)):  # type: ignore[misc]
        def __init__(self, model: nn.Module, real: RealPair) -> None:
            super().__init__(model, real)
            x = pick(real.source_inputs, slice(128))
            names = list(self.card.entries)
            with source_task(model):
                model.eval()
                with torch.no_grad():
                    y = forward_logits(model, x).argmax(1)
                top = GGN(model, F.cross_entropy, (x, y), names).top(rank, tol=1e-2)
            self.vectors, self.values = top.vectors, top.values.float() / self.card.mean

        def after_step(self, lr: float) -> None:
            c = lr * decay * self.values
            away = torch.cat(
                [(p - a).flatten() for p, a in zip(self.params, self.anchors, strict=True)]
            )
            back = self.vectors @ (c / (1 + c) * (self.vectors.T @ away))
            sizes = [p.numel() for p in self.params]
            for p, part in zip(self.params, back.split(sizes), strict=True):
                p.sub_(part.view_as(p))

    return LowRank


class Selective(Pull):
    """Selective projection decay (Tian et al. 2024, arXiv 2411.01713): a tensor is drawn back, by
    its last step over its distance, only if the step went further away."""

    STRENGTH = 1.0

    def after_step(self, lr: float) -> None:
        for p, a, b in zip(self.params, self.anchors, self.before, strict=True):
            step, away = p - b, p - a
            if (step * (b - a)).sum() > 0:
                ratio = (away.norm() - (b - a).norm()).clamp_min(0) / away.norm().clamp_min(1e-12)
                p.sub_(min(1.0, self.STRENGTH * float(ratio)) * away)
            b.copy_(p)


class EntropyGate(Pull):
    """The backbone moves as far as the head is certain: lr times 1 - entropy / log C."""

    def factor(self, logits: Tensor) -> float:
        p = logits.detach().softmax(1)
        entropy = -(p * p.clamp_min(1e-12).log()).sum(1).mean()
        return max(0.0, 1 - float(entropy) / math.log(logits.shape[1]))


class Rising(Pull):
    """Layer-wise learning rates instead of a pull: from a tenth, at the first tensor, to one."""

    def after_step(self, lr: float) -> None:
        for i, (p, b) in enumerate(zip(self.params, self.before, strict=True)):
            share = 0.1 ** (1 - i / max(1, len(self.params) - 1))
            p.copy_(b + share * (p - b))
            b.copy_(p)


PULLS: dict[str, type[Pull]] = {
    "none": Pull,
    "L2-SP 10": uniform(10.0),
    "L2-SP 30": uniform(30.0),
    "diagonal 100 (card)": diagonal(100.0),
    "diagonal 300 (card)": diagonal(300.0),
    "its mean by tensor, 100": diagonal(100.0, by_layer=True),
    "diagonal 100 + rank 16": low_rank(100.0, 16),
    "selective projection": Selective,
    "entropy gate": EntropyGate,
    "layer-wise lr, 0.1 to 1": Rising,
}


def adapt(real: RealPair, pull: Pull, batch_size: int = 64) -> nn.Module:
    """One run of the plain loop; returns the network with both heads."""
    model = real.model
    fast.replace_head(model, real.num_classes, sample=pick(real.train[0], slice(512)))
    set_batch_norm(model, "frozen")
    groups = fast.param_groups(model, LR, HEAD_SCALE, stall=STALL, ramp=RAMP)
    groups[0] |= pull.start(groups[0]["params"])
    rates = [g["lr"] for g in groups]
    optimizer = fast.AdamW(groups, lr=LR)
    model.train()
    stream = TrainBatches(as_data(real.train, "train"), batch_size, 0).from_step(0)
    for step in range(real.steps):
        inputs, labels, _ = next(stream)
        optimizer.zero_grad()
        logits = forward_logits(model, inputs)
        F.cross_entropy(logits, labels).backward()
        factor = 0.5 * (1 + math.cos(math.pi * step / real.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.param_groups[0]["lr"] *= pull.factor(logits)
        optimizer.step()
        pull.after_step(rates[0] * factor)
    return model


def accuracy(model: nn.Module, data: Any, name: str) -> float:
    data = data if callable(data) else as_data(data, name)
    return round(evaluate(model, data, 128, torch.device("cpu")).accuracy, 4)


def run(*, pair: str, pull: str, data: Path) -> Record:
    torch.manual_seed(0)
    real = real_pair(pair, data)
    source_before = accuracy(real.model, real.source, "source")
    regularizer = PULLS[pull](real.model, real)
    model = adapt(real, regularizer)
    adapted = [p.clone() for p in regularizer.params]
    ends = []
    for mix in MIXES if pull == "none" else MIXES[-1:]:
        # Weights between the pretrained and the adapted ones (WiSE-FT, arXiv 2109.01903).
        for p, a, end in zip(regularizer.params, regularizer.anchors, adapted, strict=True):
            p.copy_(torch.lerp(a, end, mix))
        target = accuracy(model, real.val, "val")
        with source_task(model):
            source = accuracy(model, real.source, "source")
        ends.append({"mix": mix, "target": target, "source": source})
    return {"ends": ends, "source_before": source_before}


def report(records: list[Record]) -> list[str]:
    pairs = list(dict.fromkeys(r["pair"] for r in records))
    cells: dict[str, dict[str, str]] = {}
    for r in sorted(records, key=lambda r: list(PULLS).index(r["pull"])):
        for end in r["ends"]:
            mix = "" if end["mix"] == 1 else f", {end['mix']:g} of the way"
            text = f"{100 * end['target']:.1f} / {100 * end['source']:.1f}"
            cells.setdefault(r["pull"] + mix, {})[r["pair"]] = text
    rows = [
        {"pull": label} | {pair: by_pair.get(pair, "-") for pair in pairs}
        for label, by_pair in cells.items()
    ]
    before = {r["pair"]: f"{100 * r['source_before']:.1f}" for r in records}
    return [
        *table(rows),
        "",
        "Target / source accuracy at the end, per cent; source before: "
        + ", ".join(f"{p} {before[p]}" for p in pairs)
        + f". One seed. {machine()}. {records[0]['commit']}.",
    ]


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    settings = [
        {"pair": pair, "pull": label} for pair, label in product(args.pairs.split(","), PULLS)
    ]
    records = complete("regularizers", run, settings, args.workers, data=args.data.resolve())
    save("regularizers", report(records))


if __name__ == "__main__":
    main()
