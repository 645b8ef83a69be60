"""Losses and labels of any kind, and a head that is kept: `fast.Adaptation` beside plain AdamW.

    python -m benchmarks.finetune.any_loss --data FOLDER

Mixup on hand signs, three labels at once, the number that a sign shows as a regression (all on a
CIFAR-10 ResNet-20), a class for each token of a text (MiniLM), and the ResNet's own ten classes on
pictures that are blurred and noisy. Both methods have the same data, steps and loss. The plain one
has a random head, or the network's own where that is kept, and `torch.optim.AdamW`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.common import Record, commits, complete, machine, save, table
from benchmarks.real_pairs import Folder, NearestClassMean, RealPair, real_pair
from fast.data.trees import pick
from fast.heads import evaluating, find_head, forward_logits

STEPS, BATCH, TEXT_BATCH = 150, 64, 16
SAMPLES, TEXT_SAMPLES, TOKENS, TEST = 1500, 600, 24, 500
METHODS = ("plain AdamW", "fast, no source inputs", "fast")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A target task.

    Attributes:
        real: network and source data; `train` and `val` have this task's labels.
        loss: of logits and labels, the mean over a batch.
        measure: what is better when higher, of the logits of `val` and its labels.
        outputs: of a new head; None: the head is kept.
        mixes: changes a batch of inputs and labels, or None.
    """

    real: RealPair
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[Tensor, Tensor], float]
    outputs: int | None
    mixes: Callable[[Any, Tensor], tuple[Any, Tensor]] | None = None
    batch_size: int = BATCH


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


def signs(data: Path, labels: Callable[[Tensor], Tensor]) -> RealPair:
    """ResNet-20 and hand signs with other labels."""
    real = real_pair("resnet20 -> sign_digits", data)
    splits = [(x[:SAMPLES], labels(y[:SAMPLES])) for x, y in (real.train, real.val)]
    return _with(real, *splits)


def _with(real: RealPair, train: Any, val: Any) -> RealPair:
    return RealPair(
        model=real.model,
        train=train,
        val=val,
        source=real.source,
        source_inputs=real.source_inputs,
        steps=STEPS,
    )


def mixup(data: Path) -> Task:
    def mixes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.distributions.Beta(0.4, 0.4).sample()
        order, soft = torch.randperm(len(y)), F.one_hot(y, 10).float()
        return torch.lerp(x[order], x, share), torch.lerp(soft[order], soft, share)

    real = signs(data, lambda y: y)
    return Task(real=real, loss=F.cross_entropy, measure=accuracy, outputs=10, mixes=mixes)


def several_labels(data: Path) -> Task:
    def labels(y: Tensor) -> Tensor:
        prime = torch.isin(y, torch.tensor([2, 3, 5, 7]))
        return torch.stack([y >= 5, y % 2 == 1, prime], 1).float()

    def all_right(logits: Tensor, y: Tensor) -> float:
        return ((logits > 0) == (y > 0)).all(1).float().mean().item()

    loss = F.binary_cross_entropy_with_logits
    return Task(real=signs(data, labels), loss=loss, measure=all_right, outputs=3)


def regression(data: Path) -> Task:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output.squeeze(1), y)

    def explained(output: Tensor, y: Tensor) -> float:
        return 1 - (loss(output, y) / y.var(correction=0)).item()

    real = signs(data, lambda y: (y.float() - 4.5) / 3)
    return Task(real=real, loss=loss, measure=explained, outputs=1)


class TokenClassifier(nn.Module):
    """MiniLM with a linear head on every token, `[B, T, C]`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.fc = encoder, nn.Linear(384, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.fc(self.encoder(ids, mask))

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder.encode(ids, mask)  # type: ignore[operator]


def tokens(data: Path) -> Task:
    """The kind of the token that follows: a special one, a continuation, a sign, or a word."""
    folder = Folder(data)
    real = real_pair("minilm -> banking77", data)
    words = (data / "weights" / "minilm_vocab.txt").read_text(encoding="utf-8").splitlines()
    kinds = [
        0 if w.startswith("[") else 1 if w.startswith("##") else 2 if not w[0].isalpha() else 3
        for w in words
    ]

    def cut(x: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        return {k: v[:n, :TOKENS] for k, v in x.items()}

    def labelled(x: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        after = F.pad(torch.tensor(kinds)[x["ids"]][:, 1:], (0, 1))
        return x, torch.where(x["mask"] > 0, after, -100)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def right(logits: Tensor, y: Tensor) -> float:
        return (logits.argmax(-1) == y)[y >= 0].float().mean().item()

    source = NearestClassMean(
        *((cut(x, 300), y[:300]) for x, y in (real.source.reference, real.source.test))  # type: ignore[union-attr]
    )
    encoder = real.model.encoder
    return Task(
        real=RealPair(
            model=TokenClassifier(encoder),  # type: ignore[arg-type]
            train=labelled(cut(real.train[0], TEXT_SAMPLES)),
            val=labelled(cut(folder.texts("banking77", "test", 200)[0], 200)),
            source=source,
            source_inputs=cut(real.source_inputs, 300),
            steps=STEPS,
        ),
        loss=loss,
        measure=right,
        outputs=4,
        batch_size=TEXT_BATCH,
    )


def blurred(x: Tensor) -> Tensor:
    """Pictures through a binomial filter, with noise of a third of their standard deviation."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 5, 5).contiguous()
    smooth = F.conv2d(F.pad(x, (2,) * 4, mode="reflect"), kernel, groups=3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return smooth + 0.33 * noise


def domain_shift(data: Path) -> Task:
    real = real_pair("resnet20 -> sign_digits", data)
    folder = Folder(data)
    x, y = folder.images("cifar10_part", "train", None, True)
    x_test, y_test = folder.images("cifar10_part", "test", None, True)
    rest = slice(500, None)  # the first are the source inputs
    train = blurred(x[rest]), y[rest]
    val = blurred(x_test[1000 : 1000 + TEST]), y_test[1000 : 1000 + TEST]
    return Task(real=_with(real, train, val), loss=F.cross_entropy, measure=accuracy, outputs=None)


TASKS: dict[str, Callable[[Path], Task]] = {
    "Mixup": mixup,
    "three labels at once, all right": several_labels,
    "regression, share of variance": regression,
    "a class for each token": tokens,
    "head kept, blurred pictures": domain_shift,
}


def run(task: str, method: str, seed: int, data: Path) -> Record:
    """One run; returns its record."""
    settings = TASKS[task](data.resolve())
    torch.manual_seed(seed)
    real, model = settings.real, copy.deepcopy(settings.real.model)
    before, start = _source(real, model), _target(settings, model)
    if method == METHODS[0]:
        _train_plainly(settings, model, seed)
    else:
        _adapt(settings, model, seed, source_inputs=method == METHODS[2])
    return {
        "before": start,
        "target": _target(settings, model),
        "source before": before,
        "source": _source(real, model),
        "machine": machine(),
    }


def _adapt(task: Task, model: nn.Module, seed: int, source_inputs: bool) -> None:
    options: dict[str, Any] = {"num_classes": task.outputs}
    if task.outputs is None:
        options = {"head": "keep"}
    adaptation = fast.Adaptation(
        model,
        task.real.train,
        source_inputs=task.real.source_inputs if source_inputs else None,
        loss=None if task.loss is F.cross_entropy else task.loss,
        augmented=task.mixes is not None,
        steps=STEPS,
        batch_size=task.batch_size,
        seed=seed,
        **options,
    )
    scheduler = adaptation.scheduler()
    model.train()
    for inputs, labels, rows in adaptation.batches():
        if task.mixes is not None:
            (inputs, labels), rows = task.mixes(inputs, labels), None
        logits, penalty = adaptation.forward(inputs, rows)
        (task.loss(logits, labels) + penalty).backward()
        adaptation.optimizer.step()
        scheduler.step()
        adaptation.optimizer.zero_grad()
    adaptation.finish()


def _train_plainly(task: Task, model: nn.Module, seed: int) -> None:
    x, y = task.real.train
    if task.outputs is not None:
        fast.replace_head(model, max(task.outputs, 2), max_entropy=False, sample=pick(x, slice(2)))
        if task.outputs == 1:
            layer = find_head(model, pick(x, slice(2))).module
            head = fast.heads.task_head(model)
            head.linear = nn.Linear(layer.weight.shape[1], 1)  # type: ignore[union-attr]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        index = torch.randint(len(y), (task.batch_size,), generator=generator)
        inputs, labels = pick(x, index), y[index]
        if task.mixes is not None:
            inputs, labels = task.mixes(inputs, labels)
        model.train()
        optimizer.zero_grad()
        task.loss(forward_logits(model, inputs), labels).backward()
        optimizer.step()
        scheduler.step()


def _target(task: Task, model: nn.Module) -> float | None:
    """What the head answers; None where it is still the source's, of another task."""
    x, y = task.real.val
    if task.outputs is not None and fast.heads.task_head(model) is None:
        return None
    with evaluating(model):
        rows = torch.arange(len(y)).split(100)
        logits = torch.cat([forward_logits(model, pick(x, index)) for index in rows])
    return task.measure(logits, y)


def _source(real: RealPair, model: nn.Module) -> float:
    with evaluating(model), fast.source_task(model):
        if callable(real.source):
            return real.source(model)
        x, y = real.source
        parts = zip(x[:TEST].split(100), y[:TEST].split(100), strict=True)
        right = [(forward_logits(model, a).argmax(1) == b).float().mean() for a, b in parts]
        return torch.stack(right).mean().item()


def rows(records: list[Record]) -> Iterator[Record]:
    """A row for a task: target, and what the source lost, in per cent."""
    for task in TASKS:
        here = [r for r in records if r["task"] == task]
        if not here:
            continue
        start = here[0]["before"]
        cells = {"task": task, "before": "" if start is None else f"{100 * start:.1f}"}
        for method in METHODS:
            runs = [r for r in here if r["method"] == method]
            if runs:
                target = sum(r["target"] for r in runs) / len(runs)
                lost = sum(r["source before"] - r["source"] for r in runs) / len(runs)
                cells[f"{method}: target / source lost"] = f"{100 * target:.1f} / {100 * lost:.1f}"
            else:
                cells[f"{method}: target / source lost"] = ""
        yield cells | {"seeds": len(runs)}


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder: real_pairs.py")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--seeds", default="0")
    args = parser.parse_args()
    names = [name for name in TASKS if any(name.startswith(t) for t in args.tasks.split(","))]
    settings = [
        {"task": task, "method": method, "seed": int(seed)}
        for seed in args.seeds.split(",")
        for task in names
        for method in METHODS
        if not (task.startswith("head kept") and method == METHODS[1])
    ]
    records = complete("any_loss", run, settings, data=args.data.resolve())
    note = f"{STEPS} steps, in per cent. {machine()}. Commit {commits(records)}."
    save("any_loss", [*table(rows(records)), "", note])


if __name__ == "__main__":
    main()
