"""`fast.finetune`: one call from a pretrained classifier to an adapted one."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fast.adapt.config import Budget, TrainConfig
from fast.adapt.guards.protect import bound_card
from fast.adapt.methods import Plan
from fast.adapt.undo import Untouched
from fast.curvature.card import SourceCard
from fast.data.dataset import Transform
from fast.data.seeding import seeded
from fast.errors import did_you_mean
from fast.heads import unwrap
from fast.train.finite import check_model
from fast.train.precision import in_float32
from fast.train.result import Result
from fast.train.resume.run_folder import RunFolder
from fast.train.trainer import Trainer

_running = threading.RLock()


def finetune(
    model: nn.Module,
    train: Any,
    val: Any = None,
    source: Any = None,
    *,
    num_classes: int | None = None,
    method: str = "fast",
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    eval_every: int | None = None,
    seed: int = 0,
    transform: Transform | None = None,
    card: SourceCard | str | Path | None = None,
    source_inputs: Any = None,
    **options: Any,
) -> Result:
    """Adapt a pretrained classifier to a new task.

    The model is changed in place: it gets a new head for `num_classes` classes (the source head is
    kept inside) and is trained; when the call fails before the first step it is again what it was,
    but for its device.
    The global random states of torch, numpy and `random` are left as they were found.

    Args:
        model: a pretrained classifier that ends in a linear layer or a 1x1 convolution. Of one that
            is compiled or data-parallel the module inside is trained, as it is written; one with
            16-bit weights is trained and returned in float32.
        train: (inputs, labels) tensors, a map-style Dataset, or a DataLoader. Inputs may be a
            tensor, or a tuple or mapping of tensors, which the model then takes as several
            arguments.
        val: the same, of the target task; measured as `target_accuracy`.
        source: the same, of the source task, only measured, as `source_accuracy`, with the source
            head; or a function of the model that returns an accuracy in 0..1.
        num_classes: C (default: from the labels).
        method: `fast`, `vanilla`, `lp-ft`, `l2-sp`, `ewc` or `replay`.
        steps, epochs: length of the run (default: 3 epochs, and at least 100 steps).
        batch_size: samples per optimizer step; a DataLoader for `train` has its own, and inputs
            that are rehearsed then come on top of them.
        lr: peak learning rate of the backbone (default: 1e-3; `fast` 1.5e-3, less in runs of fewer
            than 60 steps).
        eval_every: steps between evaluations (default: a tenth of the run).
        seed: of the head, the data order and dropout.
        transform: applied to each training batch of inputs, on the CPU: augmentation.
        card: a `fast.SourceCard` of this checkpoint, or its file: weights the pull of `fast` and
            `ewc` by what the source task needs, and forecasts what is forgotten.
        source_inputs: a few hundred source inputs, with labels or without: `fast` rehearses their
            features in its batches, `ewc` makes its card of them, `replay` trains on them beside
            the target, and forecasts and `forget_budget` are checked on others of them, held back.
            Without them `fast` rehearses features of the target's inputs, and `ewc` makes its card
            of these, which protects less.
        **options: the other fields of `fast.adapt.config.TrainConfig`.

    Returns:
        `Result`: model, history, accuracies, `save(folder)`.

    Raises:
        ValueError, TypeError: an option, the data or the model does not fit; the message names it.
        FileNotFoundError: nothing to resume from; or the folder of the run is no longer there.
        RuntimeError: another thread of this process is in here.
        FloatingPointError: the run diverged: a loss, a weight or an answer is NaN or infinite.
    """
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        hint = did_you_mean(unknown[0], known) or f". Known: {', '.join(sorted(known))}"
        raise TypeError(f"finetune got unknown options: {', '.join(unknown)}{hint}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    config = TrainConfig(
        method=method,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        eval_every=eval_every,
        seed=seed,
        **options,
    )
    _note_budget(config)
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise ValueError(f"finetune was called under torch.{mode}, where nothing can be trained")
    model = _module_inside(model)
    check_model(model)
    untouched = Untouched(model, weights=config.resume is not None)
    if card is not None:  # of the weights as they were saved, which may be of 16 bits
        card = bound_card(card, model)
    with (
        _alone(),
        seeded(seed),
        untouched,
        in_float32(model),
        RunFolder(config) if config.output or config.resume else nullcontext() as folder,
    ):
        trainer = Trainer(
            config, model, train, val, source, num_classes, transform, card, source_inputs, folder
        )
        return trainer.run(untouched.keep)


class _Planned(Exception):
    """Ends the set-up of a run that is only planned, so that the model is put back as it was."""


def plan(
    model: nn.Module,
    train: Any,
    val: Any = None,
    source: Any = None,
    *,
    num_classes: int | None = None,
    transform: Transform | None = None,
    card: SourceCard | str | Path | None = None,
    source_inputs: Any = None,
    **options: Any,
) -> Plan:
    """The settings that the options of `finetune` come to; the model is left as it was.

    Args: those of `finetune`.

    Raises: what `finetune` raises before its first step.
    """
    config = TrainConfig(**options)
    model = _module_inside(model)
    check_model(model)
    if card is not None:
        card = bound_card(card, model)
    data = (train, val, source, num_classes, transform, card, source_inputs)
    untouched = Untouched(model, weights=False)
    with suppress(_Planned), _alone(), seeded(config.seed), untouched, in_float32(model):
        settings = Trainer(config, model, *data).plan
        raise _Planned
    return settings


def _module_inside(model: nn.Module) -> nn.Module:
    inside = unwrap(model)
    if inside is not model:
        warnings.warn(
            f"model is a {type(model).__name__}: the {type(inside).__name__} inside is trained, as "
            "it is written and on one device",
            stacklevel=3,
        )
    return inside


def _note_budget(config: TrainConfig) -> None:
    budget = None if config.forget_budget is None else Budget.parse(config.forget_budget)
    if budget and not budget.points and budget.amount >= 1:
        warnings.warn(
            f"forget_budget {budget} lets the source loss rise by as much; points of accuracy "
            f"are written '{budget.amount:g}%'",
            stacklevel=3,
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Raise RuntimeError where another thread is in here: a run seeds the generators of the whole
    process."""
    if not _running.acquire(blocking=False):
        raise RuntimeError(
            "another thread of this process is in fast.finetune, and both would draw from the same "
            "random generators: run one after the other, or each in a process of its own"
        )
    try:
        yield
    finally:
        _running.release()
