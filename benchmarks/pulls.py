"""What else could hold the source: pulls that are not in the package, each in the same plain loop.

    python benchmarks/pulls.py --data FOLDER

Maximum-entropy head, frozen batch norm, stall, ramp and a cosine schedule as in `fast`; no
distillation, rehearsal or averaging. Source inputs (unlabelled) serve the curvature. Printed are
target and source accuracy at the end, on the first seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from fast.adapt.schedule import lr_factor
from fast.curvature import GGN
from fast.data.dataset import as_data
from fast.data.stream import TrainBatches
from fast.data.trees import pick
from fast.heads import forward_logits, set_batch_norm, source_task
from fast.train.metrics import evaluate
from pairs import PAIRS, Folder, Job
from runs import RESULTS, commit, machine

NAMES = "resnet20 -> gtsrb,resnet20 -> sign_digits,mobilenet 0.25 -> flowers"
LR, HEAD_SCALE, STALL, RAMP = 1e-3, 10.0, 5, 30
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Pull:
    """Nothing: the loop alone. `options` go to the backbone's parameter group."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module, job: Job) -> None:
        self.params: list[Tensor] = []
        self.anchors: list[Tensor] = []
        self.before: list[Tensor] = []  # the last step, for those that look at it

    def start(self, params: list[nn.Parameter]) -> dict[str, Any]:
        """Called with the backbone's parameters, at the pretrained weights; returns options of
        their group."""
        self.params = [p.detach() for p in params]
        self.anchors = [p.clone() for p in self.params]
        self.before = [p.clone() for p in self.params]
        return dict(self.options)

    def factor(self, logits: Tensor) -> float:
        """On the backbone's learning rate of this step."""
        return 1.0

    def after_step(self, lr: float) -> None:
        """After the optimizer's step, which had this learning rate."""


def uniform(decay: float) -> type[Pull]:
    """L2-SP (arXiv 1802.01483), proximal."""
    return type("Uniform", (Pull,), {"options": {"anchor_decay": decay}})


def diagonal(decay: float, by_layer: bool = False) -> type[Pull]:
    """EWC (arXiv 1612.00796), proximal, by a card; or its mean over each tensor."""

    class Diagonal(Pull):
        def __init__(self, model: nn.Module, job: Job) -> None:
            super().__init__(model, job)
            self.card = fast.SourceCard.estimate(model, job.source_inputs)

        def start(self, params: list[nn.Parameter]) -> dict[str, Any]:
            found = self.card.curvature_for(params)
            if by_layer:
                found = [None if f is None else torch.full_like(f, float(f.mean())) for f in found]
            return super().start(params) | {"anchor_decay": decay, "curvature": found}

    return Diagonal


def low_rank(decay: float, rank: int) -> type[Pull]:
    """The card's diagonal, and in the stiffest directions of the GGN the pull of their eigenvalue,
    over the mean of the diagonal as the diagonal itself is."""

    class LowRank(diagonal(decay)):  # type: ignore[misc]
        def __init__(self, model: nn.Module, job: Job) -> None:
            super().__init__(model, job)
            x = pick(job.source_inputs, slice(128))
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
    its last step over its distance, only when the step went further away."""

    STRENGTH = 1.0

    def after_step(self, lr: float) -> None:
        for p, a, b in zip(self.params, self.anchors, self.before, strict=True):
            step, away = p - b, p - a
            if (step * (b - a)).sum() > 0:
                ratio = (away.norm() - (b - a).norm()).clamp_min(0) / away.norm().clamp_min(1e-12)
                p.sub_(min(1.0, self.STRENGTH * float(ratio)) * away)
            b.copy_(p)


class EntropyGate(Pull):
    """The backbone moves as far as the head is sure: lr times 1 - entropy / log C."""

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


def adapt(job: Job, pull: Pull, steps: int, batch_size: int = 64) -> nn.Module:
    """One run of the plain loop; returns the network with both heads."""
    model = job.model
    data = as_data(job.train, "train")
    fast.replace_head(model, int(job.train[1].max()) + 1, sample=pick(job.train[0], slice(512)))
    set_batch_norm(model, "frozen")
    groups = fast.param_groups(model, LR, HEAD_SCALE, stall=STALL, ramp=RAMP)
    groups[0] |= pull.start(groups[0]["params"])
    rates = [g["lr"] for g in groups]
    optimizer = fast.AdamW(groups, lr=LR)
    model.train()
    stream = TrainBatches(data, batch_size, 0).from_step(0)
    for step in range(steps):
        inputs, labels, _ = next(stream)
        optimizer.zero_grad()
        logits = forward_logits(model, inputs)
        F.cross_entropy(logits, labels).backward()
        factor = lr_factor("cosine", step, steps, 0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.param_groups[0]["lr"] *= pull.factor(logits)
        optimizer.step()
        pull.after_step(rates[0] * factor)
    return model


def scores(model: nn.Module, job: Job) -> tuple[float, float]:
    """(target, source) accuracy."""
    device = torch.device("cpu")
    target = evaluate(model, as_data(job.val, "val"), 128, device).accuracy
    source = job.source if callable(job.source) else as_data(job.source, "source")
    with source_task(model):
        return target, evaluate(model, source, 128, device).accuracy


def run(task: tuple[str, str, Path]) -> dict[str, Any]:
    name, label, folder = task
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pair = PAIRS[name]
    job = pair.make(Folder(folder))
    before = copy.deepcopy(job.model)
    pull = PULLS[label](job.model, job)
    model = adapt(job, pull, pair.steps)
    ends = [p.clone() for p in pull.params]
    found = []
    for mix in MIXES[1:] if label == "none" else MIXES[-1:]:
        # Weights between the pretrained and the adapted ones (WiSE-FT, arXiv 2109.01903).
        for p, a, e in zip(pull.params, pull.anchors, ends, strict=True):
            p.copy_(torch.lerp(a, e, mix))
        target, source = scores(model, job)
        found.append({"mix": mix, "target": round(target, 4), "source": round(source, 4)})
    record = {"pair": name, "pull": label, "ends": found, "commit": commit()}
    record["source_before"] = round(scores_before(before, job), 4)
    return record


def scores_before(model: nn.Module, job: Job) -> float:
    source: Callable[[nn.Module], float] | Any = job.source
    if not callable(source):
        source = as_data(source, "source")
    return evaluate(model, source, 128, torch.device("cpu")).accuracy


def report(records: list[dict[str, Any]]) -> str:
    pairs = list(dict.fromkeys(r["pair"] for r in records))
    lines = [
        f"| pull | {' | '.join(pairs)} |",
        "| --- |" + " --- |" * len(pairs),
    ]
    cells: dict[str, dict[str, str]] = {}
    for r in records:
        for end in r["ends"]:
            mix = "" if end["mix"] == 1 else f", {end['mix']:g} of the way"
            text = f"{100 * end['target']:.1f} / {100 * end['source']:.1f}"
            cells.setdefault(r["pull"] + mix, {})[r["pair"]] = text
    for label, row in cells.items():
        lines.append(f"| {label} | {' | '.join(row.get(p, '-') for p in pairs)} |")
    before = {r["pair"]: f"{100 * r['source_before']:.1f}" for r in records}
    lines += [
        "",
        "Target / source accuracy at the end, per cent; source before: "
        + ", ".join(f"{p} {before[p]}" for p in pairs)
        + f". One seed. {machine()}. {records[0]['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=NAMES, help="names, separated by commas")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    store = RESULTS / "pulls.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(r["pair"], r["pull"]) for r in records}
    tasks = [
        (pair, label, args.data.resolve())
        for pair in args.pairs.split(",")
        for label in PULLS
        if (pair, label) not in done
    ]
    with get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for record in pool.imap_unordered(run, tasks):
            records.append(record)
            with store.open("a") as f:
                f.write(json.dumps(record) + "\n")
            print(record, flush=True)
    order = {label: i for i, label in enumerate(PULLS)}
    records.sort(key=lambda r: order[r["pull"]])
    text = report(records)
    (RESULTS / "pulls.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
