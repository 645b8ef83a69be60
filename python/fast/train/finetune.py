"""`fast.finetune`: one call from a pretrained classifier to an adapted one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from fast.adapt.config import check_options
from fast.adapt.network.rollback import RollbackOnError
from fast.adapt.network.trainable import check_gradients, check_model
from fast.adapt.plan import Plan
from fast.adapt.result import Result
from fast.adapt.setup import settle
from fast.adapt.source import bound_card
from fast.curvature.card import SourceCard
from fast.data.generators import seeded
from fast.data.transform import Transform
from fast.errors import warn
from fast.heads import unwrap
from fast.models.device import in_float32, pick_device
from fast.ranks import joined
from fast.train.config import TrainConfig, TrainOptions
from fast.train.log.history import Callback, check_callbacks
from fast.train.resume.run_folder import RunFolder
from fast.train.run_data import note_shared_samples, read_data
from fast.train.trainer import Trainer

_running = threading.RLock()


def finetune(
    model: nn.Module,
    train: Any,
    val: Any = None,
    source: Any = None,
    *,
    num_classes: int | None = None,
    transform: Transform | None = None,
    card: SourceCard | str | Path | None = None,
    source_inputs: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Unpack[TrainOptions],
) -> Result:
    """Adapt a pretrained classifier to a new task.

    The model is changed in place: it gets a new head for `num_classes` classes (the source head is
    kept inside) and is trained. If the call fails before the first step, the model is as it was,
    except for its device.
    Inside an initialised process group, and under `torchrun`, all processes train the network
    together: docs/distributed.md.
    The global random states of torch, numpy and `random` are left as they were found.

    Args:
        model: a pretrained classifier that ends in a linear layer or a 1x1 convolution. If it is
            compiled or data-parallel, the plain module inside is trained; 16-bit weights are
            trained and returned in float32.
        train: (inputs, labels) tensors, a map-style Dataset, or a DataLoader. Inputs may be a
            tensor, or a tuple or mapping of tensors, which the model then takes as several
            arguments.
        val: the same, of the target task; measured as `target_accuracy`.
        source: the same, of the source task. It is never trained on, only measured with the source
            head as `source_accuracy`; or a function of the model that returns an accuracy in 0..1.
        num_classes: C (default: from the labels).
        transform: applied to each training batch of inputs, on the CPU: augmentation.
        card: a `fast.SourceCard` of this checkpoint, or its file: weights the pull of `fast` and
            `ewc` by what the source task needs, and forecasts what is forgotten.
        source_inputs: a few hundred source inputs, with labels or without. `fast` rehearses their
            features in its batches, `ewc` makes its card of them, `replay` trains on them beside
            the target; some are held back to check forecasts and `forget_budget` on. Without
            source inputs, `fast` rehearses features of the target's inputs, and `ewc` makes its
            card of these, which protects less; `fast.synthetic_inputs` makes some of a network with
            batch norm.
        callbacks: functions that are called with the record of each evaluation, as it is in
            `Result.history`: for loggers. An exception in one ends the run, and names it.
        **options: the fields of `fast.train.config.TrainConfig`, the first of which are `method`
            (`fast`, `vanilla`, `lp-ft`, `l2-sp`, `ewc`, `replay` or `adapter`), `tasks` (whether
            one function answers both tasks, docs/regimes.md), `steps` or `epochs` (default: 3
            epochs, and at least 100 steps), `batch_size` (a DataLoader for `train` has its own, and
            rehearsed inputs then come on top), `lr` (peak learning rate of the backbone; default:
            1e-3, `fast` 1.5e-3, or 5e-4 with layer norms, `adapter` 1e-2; docs/defaults.md says
            when it is lowered), `eval_every` (default: a tenth of the run) and `seed` (of head,
            data order and dropout).

    Returns:
        `Result`: model, history, accuracies, `save(folder)`.

    Raises:
        ValueError, TypeError: an option, the data or the model does not fit; the message names it.
        FileNotFoundError: there is nothing to resume from, or the run's folder has disappeared.
        RuntimeError: another thread of this process is inside `finetune`.
        FloatingPointError: the run diverged: a loss, a weight or an answer is NaN or infinite.
    """
    config, model = _checked(model, options)
    callbacks = check_callbacks(callbacks)
    if config.budget is not None:
        config.budget.warn_of_nats("forget_budget")
    check_model(model)
    rollback = RollbackOnError(model, weights=config.resume is not None)
    if card is not None:  # it fits the weights as they were saved, perhaps in 16 bits
        card = bound_card(card, model)
    with joined() as ranks, ranks.quiet(), _alone():
        has_folder = bool(config.output or config.resume)
        folder_or_none = RunFolder(config, ranks) if has_folder else nullcontext()
        with seeded(config.seed), rollback, in_float32(model), folder_or_none as folder:
            with ranks.together():
                data = read_data(config, model, train, val, source, transform, num_classes)
                if ranks.first:
                    note_shared_samples(data)
                model = model.to(pick_device(config.device))
            trainer = Trainer(
                config,
                model,
                data,
                card=card,
                source_inputs=source_inputs,
                folder=folder,
                callbacks=callbacks if ranks.first else (),
                ranks=ranks,
                began=rollback.keep,
            )
            return trainer.run()


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
    **options: Unpack[TrainOptions],
) -> Plan:
    """What `fast.finetune` would do with these arguments; nothing is trained or changed."""
    config, model = _checked(model, options)
    check_model(model)
    if card is not None:
        bound_card(card, model)
    with seeded(config.seed), RollbackOnError(model), in_float32(model):
        data = read_data(config, model, train, val, source, transform, num_classes)
        return settle(
            config,
            model,
            data.train,
            num_classes=data.num_classes,
            source_inputs=source_inputs,
            has_card=card is not None,
            any_labels=False,
        ).plan


def _checked(model: Any, options: Any) -> tuple[TrainConfig, nn.Module]:
    check_options(options, TrainConfig, "finetune")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    config = TrainConfig(**options)
    check_gradients("finetune")
    inside = unwrap(model)
    if inside is not model:
        warn(
            f"model is a {type(model).__name__}: the {type(inside).__name__} inside is trained, as "
            "it is written and on one device",
        )
    return config, inside


@contextmanager
def _alone() -> Iterator[None]:
    """Let one thread in at a time, because a run seeds the generators of the whole process.

    Raises:
        RuntimeError: another thread is inside.
    """
    if not _running.acquire(blocking=False):
        raise RuntimeError(
            "another thread of this process is in fast.finetune, and both would draw from the same "
            "random generators: run one after the other, or each in a process of its own"
        )
    try:
        yield
    finally:
        _running.release()
