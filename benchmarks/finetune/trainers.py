"""Other people's trainers, each with the method inside: the runners of `integrations.py`.

A trainer is a function that trains the model of a `Task` in place. Its library is loaded when it
runs.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fast
from benchmarks.real_pairs import Split
from fast.data.trees import pick

STEPS, TARGET_SIZE, SOURCE_SIZE = 60, 28, 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pretrained network, target data `(inputs, labels)`, and what measures the source."""

    model: nn.Module
    train: Split
    val: Split
    source_inputs: Any
    skill: Callable[[nn.Module], float]

    @property
    def classes(self) -> int:
        return int(self.train[1].max()) + 1


class Rows(Dataset[Any]):
    """Samples with their row numbers, by which answers of the source head are remembered."""

    def __init__(self, data: Split) -> None:
        self.inputs, self.labels = data

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, Tensor, int]:
        return pick(self.inputs, i), self.labels[i], i


def loader(task: Task) -> DataLoader[Any]:
    return DataLoader(Rows(task.train), TARGET_SIZE, shuffle=True, drop_last=True)


def adaptation(
    task: Task, seed: int, model: nn.Module | None = None, **options: Any
) -> fast.Adaptation:
    return fast.Adaptation(
        model or task.model,
        task.train,
        source_inputs=task.source_inputs,
        steps=STEPS,
        batch_size=TARGET_SIZE + SOURCE_SIZE,
        seed=seed,
        **options,
    )


def batches(task: Task) -> Any:
    """`STEPS` batches, over as many epochs as they take."""
    done = 0
    while True:
        for batch in loader(task):
            if done == STEPS:
                return
            done += 1
            yield batch


def with_finetune(task: Task, seed: int, **options: Any) -> None:
    fast.finetune(
        task.model,
        task.train,
        source_inputs=task.source_inputs,
        steps=STEPS,
        batch_size=TARGET_SIZE + SOURCE_SIZE,
        seed=seed,
        progress=False,
        **options,
    )


def with_transformers(task: Task, seed: int) -> None:
    from transformers import TrainingArguments

    from fast.integrations.transformers import FastTrainer

    inputs, labels = task.train
    if isinstance(inputs, Tensor):  # the Trainer calls by name
        inputs = {next(iter(inspect.signature(task.model.forward).parameters)): inputs}
    rows = [pick(inputs, i) | {"labels": y} for i, y in enumerate(labels.tolist())]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=TARGET_SIZE,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        FastTrainer(
            task.model,
            args,
            train_dataset=rows,
            num_classes=task.classes,
            source_inputs=task.source_inputs,
        ).train()


def with_lightning(task: Task, seed: int) -> None:
    import lightning

    from fast.integrations.lightning import FastCallback

    class Classifier(lightning.LightningModule):
        def __init__(self, network: nn.Module, method: FastCallback) -> None:
            super().__init__()
            self.network, self.method = network, method

        def configure_optimizers(self) -> Any:
            return self.method.optimizers()

        def training_step(self, batch: Any, _: int) -> Tensor:
            inputs, labels, rows = batch
            logits, penalty = self.method.forward(inputs, rows)
            return F.cross_entropy(logits, labels) + penalty

    method = FastCallback(
        task.model,
        task.train,
        source_inputs=task.source_inputs,
        batch_size=TARGET_SIZE + SOURCE_SIZE,
        seed=seed,
    )
    lightning.Trainer(
        max_steps=STEPS,
        callbacks=[method],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Classifier(task.model, method), loader(task))


def with_timm(task: Task, seed: int) -> None:
    from fast.integrations.timm import AdaptationTask

    method = adaptation(task, seed)
    training, scheduler = AdaptationTask(method, verbose=False), method.scheduler()
    training.train()
    for inputs, labels, rows in batches(task):
        training(inputs, labels, rows)["loss"].backward()
        method.optimizer.step(), scheduler.step(), method.optimizer.zero_grad()
    method.finish()


def with_accelerate(task: Task, seed: int) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    method = adaptation(task, seed)
    prepared, optimizer, scheduler = accelerator.prepare(
        task.model, method.optimizer, method.scheduler()
    )
    prepared.train()
    for inputs, labels, rows in batches(task):
        logits, penalty = method.forward(inputs, rows, model=prepared)
        accelerator.backward(F.cross_entropy(logits, labels) + penalty)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
    method.finish()


def with_peft(task: Task, seed: int, **options: Any) -> None:
    """LoRA on every convolution of a convolutional network, and on every linear layer of others,
    except for the head, which `fast.Adaptation` replaces."""
    import peft

    kind = nn.Conv2d if any(isinstance(m, nn.Conv2d) for m in task.model.modules()) else nn.Linear
    layers = [name for name, m in task.model.named_modules() if isinstance(m, kind)]
    names = [name for name in layers if name != "classifier"]
    model: Any = peft.get_peft_model(task.model, peft.LoraConfig(r=8, target_modules=names))  # type: ignore[arg-type]
    method = adaptation(task, seed, model, **options)
    scheduler = method.scheduler()
    model.train()
    for inputs, labels, rows in batches(task):
        logits, penalty = method.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        method.optimizer.step(), scheduler.step(), method.optimizer.zero_grad()
    method.finish()


Runner = Callable[[Task, int], None]
RUNNERS: dict[str, Runner] = {
    "fast.finetune": with_finetune,
    "AdamW in fast.finetune": lambda task, seed: with_finetune(
        task, seed, method="vanilla", lr=3e-4
    ),
    "transformers.FastTrainer": with_transformers,
    "Lightning": with_lightning,
    "timm": with_timm,
    "Accelerate": with_accelerate,
    "PEFT (LoRA)": with_peft,
    "PEFT (LoRA) at 3e-3": partial(with_peft, lr=3e-3),
}
