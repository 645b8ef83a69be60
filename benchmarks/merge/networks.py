"""Networks for the union of two tasks: what `fast.join` is measured on, and its baselines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.real_pairs import RealPair, Split, real_pair
from fast.heads import evaluating, features_of, find_head
from fast.heads.find import classes_of, layer_like

HELD_BACK = 500
BATCH = 64
TEMPERATURE = 2.0  # of LwF, as in its paper
HEAD_LR_SCALE = 10.0  # of every baseline, as LP-FT has it
PROBE_STEPS = 200  # of the head alone, on features


def kept(folder: Path, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """The network in a file of that name, which is made where it is not there."""
    file = folder / f"{name.translate(str.maketrans(' :>/', '____'))}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = make()
        torch.save(model, file)
    return torch.load(file, weights_only=False)


def held_back(real: RealPair) -> tuple[Split, Split]:
    """Target data to train on, and a tenth of them, at most `HELD_BACK`, to calibrate with."""
    x, y = real.train
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    count = min(HELD_BACK, len(y) // 10)
    return (x[rows[count:]], y[rows[count:]]), (x[rows[:count]], y[rows[:count]])


def adapted(pair: str, seed: int, data: Path, **options: Any) -> nn.Module:
    """The network after `fast.finetune`."""
    torch.manual_seed(seed)
    real = real_pair(pair, data)
    return fast.finetune(
        real.model,
        options.pop("train", real.train),
        num_classes=real.num_classes,
        steps=real.steps,
        seed=seed,
        progress=False,
        **options,
    ).model


def trained_jointly(pair: str, seed: int, data: Path, method: str, lr: float) -> nn.Module:
    """A network with one head for the rows of both tasks, trained by `replay` or `lwf`.

    Replay: one softmax over all classes; each step has as many source inputs as target inputs, and
    the source inputs are learned as the pretrained network answers them. LwF (Li and Hoiem 2016,
    arXiv 1606.09282): one softmax over all classes on target inputs, on which the source's softened
    answers are kept. As in LP-FT the head learns alone first, on features of the pretrained
    network. Batch norms keep the source's statistics.
    """
    torch.manual_seed(seed)
    real = real_pair(pair, data)
    model, (x, y) = real.model.eval(), real.train
    head = find_head(model, x[:2])
    old = classes_of(head.module)
    seen = real.source_inputs if method == "replay" else x
    answers = logits_of(model, seen)
    features = [features_by_parts(model, head.module, inputs) for inputs in (x, seen)]
    layer = layer_like(head.module, old + real.num_classes, bias=True)
    with torch.no_grad():
        layer.weight[:old], layer.bias[:old] = head.module.weight, head.module.bias  # type: ignore[index,assignment]
    head.put(layer)

    def replay_loss(forward: Callable[[Tensor], Tensor], new: Tensor, kept: Tensor) -> Tensor:
        rows, others = shuffled[0].take(BATCH), shuffled[1].take(BATCH)
        logits = forward(torch.cat([new[rows], kept[others]]))
        soft = F.pad(answers[others].softmax(1), (0, real.num_classes))
        loss = F.cross_entropy(logits[:BATCH], old + y[rows])
        return loss + F.cross_entropy(logits[BATCH:], soft)

    def lwf_loss(forward: Callable[[Tensor], Tensor], new: Tensor, _: Tensor) -> Tensor:
        rows = shuffled[0].take(BATCH)
        logits = forward(new[rows])
        before, now = ((z / TEMPERATURE).log_softmax(1) for z in (answers[rows], logits[:, :old]))
        kl = F.kl_div(now, before, log_target=True, reduction="batchmean")
        return F.cross_entropy(logits, old + y[rows]) + TEMPERATURE**2 * kl

    loss = replay_loss if method == "replay" else lwf_loss
    shuffled = Shuffled(len(y)), Shuffled(len(seen))
    in_head = {id(p) for p in layer.parameters()}
    own = {"params": list(layer.parameters()), "lr": HEAD_LR_SCALE * lr}
    backbone = [p for p in model.parameters() if id(p) not in in_head]
    optimizer = torch.optim.AdamW([own], weight_decay=0.0)
    train(optimizer, PROBE_STEPS, lambda: loss(layer, *features))
    optimizer = torch.optim.AdamW([{"params": backbone, "lr": lr}, own], weight_decay=0.0)
    train(optimizer, real.steps, lambda: loss(model, x, seen))
    return model.requires_grad_(False)


def features_by_parts(model: nn.Module, head: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([features_of(model, head, part).flatten(1) for part in inputs.split(128)])


def train(optimizer: torch.optim.Optimizer, steps: int, loss: Callable[[], Tensor]) -> None:
    """So many steps, at rates that fall as a cosine."""
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        cosine.step()


class Shuffled:
    """Row numbers in random order, in a new order when all were taken."""

    def __init__(self, count: int) -> None:
        self.count, self.rows = count, torch.empty(0, dtype=torch.int64)

    def take(self, size: int) -> Tensor:
        if len(self.rows) < size:
            self.rows = torch.cat([self.rows, torch.randperm(self.count)])
        taken, self.rows = self.rows[:size], self.rows[size:]
        return taken


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    with evaluating(model):
        return torch.cat([model(x) for x in inputs.split(128)])
