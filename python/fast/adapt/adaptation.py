"""`fast.Adaptation`: the method as an object, which any training loop can drive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fast import dtensor
from fast.adapt.config import AdaptConfig, AdaptOptions, OptimizerName, boolean, check_options
from fast.adapt.guards.base import Guards, MicroBatch, Seen
from fast.adapt.guards.budget import ForgettingBudget
from fast.adapt.guards.weight_average import WeightAverage
from fast.adapt.loss import Loss, TargetLoss
from fast.adapt.network.head_start import HeadStart
from fast.adapt.network.micro_batches import MicroBatches
from fast.adapt.network.prepare import prepare_network
from fast.adapt.network.rollback import RollbackOnError
from fast.adapt.network.trainable import check_arguments, check_model
from fast.adapt.optimizer import AdaptedOptimizer, MakeOptimizer, check_own_optimizer
from fast.adapt.result import Result, unmeasured
from fast.adapt.setup import check_ranks, settle
from fast.adapt.source import bound_card, measure_source
from fast.adapt.state import RUN, check_state, run_facts, sharded_as
from fast.curvature.card import SourceCard
from fast.data.dataset import Data
from fast.data.trees import move
from fast.errors import warn
from fast.heads import running_statistics, unwrap
from fast.models.device import in_float32, trains_in_16_bits
from fast.models.signature import signature_of
from fast.ranks import AUTO, Ranks, tensors_of

FORMAT = 3  # of a state


class Adaptation:
    """Adapts a pretrained network to a target task, and holds what it knew.

    The object has no loop. A loop takes its optimizer, passes inputs through `forward`, and adds
    the penalty to its own loss; everything that follows a step runs in the optimizer's step hooks.
    Schedulers, gradient scalers and accumulation belong to the loop:

        adaptation = fast.Adaptation(model, (x, y), source_inputs=kept, steps=1000, batch_size=64)
        optimizer, scheduler = adaptation.optimizer, adaptation.scheduler()
        model.train()
        for inputs, labels, rows in adaptation.batches():
            logits, penalty = adaptation.forward(inputs, rows)
            (F.cross_entropy(logits, labels) + penalty).backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
        result = adaptation.finish()

    This gives the weights of `fast.finetune`, bit for bit, after `torch.manual_seed(seed)`.

    The model is changed in place: it gets a new head (or keeps its own, with `head="keep"`), which
    is taught on the features of training inputs before the first step. If the constructor fails,
    the model is left as it was.

    Args:
        model: a pretrained network, on the device it is trained on.
        train: training data: `(inputs, labels)`, a map-style Dataset or a DataLoader. The loop may
            read them in any way; here they calibrate the head, teach it, and provide the inputs
            whose source answers or features are kept.
        num_classes: C, outputs of the new head (default: from the labels).
        source_inputs: a few hundred source inputs, with labels or without: see `fast.finetune`.
        card: a `fast.SourceCard` of this checkpoint, or its file.
        loss: teaches the head before the first step: `loss(logits, labels)`, the mean over a
            batch. Default: cross-entropy, and labels are class indices `[N]`. With any other loss
            labels may be any tensor `[N, ...]` that it takes (several labels, numbers, positions).
        optimizer: "adamw" or "sgd", fused; or a function of parameter groups that returns any
            `torch.optim.Optimizer`, to which the pull is added unfused.
        augmented: the loop changes inputs between visits (augmentation, Mixup), so that source
            answers cannot be remembered by row.
        autocast_dtype: precision of the passes before the first step; None for full precision.
        resuming: a state will be loaded before the first step; what it holds is not computed here.
        process_group: the processes that train together, each on its share of every batch (see
            docs/distributed.md). `"auto"` takes all of them if torch.distributed is initialised;
            None takes this process alone. Every process gets the same data and options.
        **options: the fields of `fast.adapt.config.AdaptConfig`: `method`, `steps`, `epochs`,
            `batch_size`, `lr`, `seed`, `head`, ...

    Attributes:
        optimizer: `fast.AdamW`, `fast.SGD`, or what `optimizer` returned.
        plan: the resolved settings.
        target_size: target samples per step; together with the source inputs that ride along they
            make up `batch_size`.
        guards: the parts that hold the source.
        done: steps taken.
        ranks: the processes that train together.
        sample: a batch of target inputs, on the model's device.

    Raises:
        ValueError, TypeError: an option, the data or the model does not fit; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        *,
        num_classes: int | None = None,
        source_inputs: Any = None,
        card: SourceCard | str | Path | None = None,
        loss: Loss | None = None,
        optimizer: OptimizerName | MakeOptimizer = "adamw",
        augmented: bool = False,
        autocast_dtype: torch.dtype | None = None,
        resuming: bool = False,
        process_group: Any = AUTO,
        **options: Unpack[AdaptOptions],
    ) -> None:
        make = None if isinstance(optimizer, str) else optimizer
        name = {"optimizer": optimizer} if isinstance(optimizer, str) else {}
        check_options(options, AdaptConfig, "Adaptation")
        # The record settles a method of None.
        self.config = AdaptConfig(**options, **name)  # type: ignore[arg-type]
        check_arguments(model, loss, keeps_head=self.config.keeps_head)
        augmented, resuming = boolean("augmented", augmented), boolean("resuming", resuming)
        if not name:
            check_own_optimizer(make, self.config)
            # How an optimizer of the user's own decays weights is its own affair.
            self.config = replace(self.config, head_decay=0.0)
        self.model = unwrap(model)
        self.ranks = Ranks(process_group)
        if not isinstance(train, Data):  # whoever read it has checked the network
            check_model(self.model)
        self.done = self._began = 0  # steps taken; and those before this process
        self._part, self._ran = 0, False  # the next micro-batch of this step; any pass so far
        self._stepping = False
        self._final: list[int] | None = None  # versions of the final weights, once there are some
        with RollbackOnError(self.model), ExitStack() as until_closed:
            self.ranks.copy_from_first(tensors_of(self.model))
            with self.ranks.together():  # a card fits the weights as they were saved
                bound = None if card is None else bound_card(card, self.model)
            if trains_in_16_bits(self.model):
                until_closed.enter_context(in_float32(self.model))
            self._prepare(
                train,
                num_classes=num_classes,
                source_inputs=source_inputs,
                card=bound,
                loss=TargetLoss(None, 0.0) if loss is None else loss,
                make=make,
                augmented=augmented,
                autocast_dtype=autocast_dtype,
                resuming=resuming,
            )
            self.optimizer.register_step_pre_hook(self._before_step)
            self.optimizer.register_step_post_hook(self._after_step)
            self._until_closed = until_closed.pop_all()
        self.optimizer.zero_grad()  # of the last step on another task

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an Adaptation cannot be copied or pickled, because it has hooks on its network and "
            "optimizer: copy adaptation.model, or save state_dict() (docs/own-loop.md)"
        )

    def _prepare(
        self,
        train: Any,
        *,
        num_classes: int | None,
        source_inputs: Any,
        card: SourceCard | None,
        loss: Loss,
        make: MakeOptimizer | None,
        augmented: bool,
        autocast_dtype: torch.dtype | None,
        resuming: bool,
    ) -> None:
        """Settle the plan, measure the source, prepare the network, make optimizer and guards.

        Args:
            card: the user's card, bound to the model; or None.
            make: makes the optimizer of parameter groups; None takes the one that the plan names.
        """
        model, config, ranks = self.model, self.config, self.ranks
        with ranks.together():
            setup = settle(
                config,
                model,
                train,
                num_classes=num_classes,
                source_inputs=source_inputs,
                has_card=card is not None,
                any_labels=not isinstance(loss, TargetLoss),
                ranks=ranks,
            )
        check_ranks(setup)
        self.num_classes, self.sample = setup.num_classes, setup.sample
        self._batches = setup.batches

        # The source is measured at the pretrained weights, before the network changes.
        source = measure_source(model, setup, card)
        self.source = source.samples
        self.held_back = source.meter.samples if source.meter is not None else None

        mixed = autocast_dtype is not None
        with ranks.together(), torch.autocast(setup.device.type, autocast_dtype, enabled=mixed):
            self._network, holding = prepare_network(
                model, setup, source.samples, loss=loss, augmented=augmented, resuming=resuming
            )
        ranks.copy_from_first(tensors_of(model))
        if config.shard and ranks.size > 1:
            self._network.shard(setup.sample, ranks)

        self._optimizer = optimizer = AdaptedOptimizer(model, setup, card=source.card, make=make)
        self.optimizer: Optimizer = optimizer.optimizer
        self.last_lr = optimizer.lr
        self.plan = plan = optimizer.plan  # a user's optimizer has a rate of its own
        self.drift = self._network.drift = optimizer.drift
        self.head_start = HeadStart(model, self.drift) if plan.head_steps else None
        self._statistics = running_statistics(model) if plan.batch_norm != "frozen" else []

        self.guards = guards = Guards(holding)
        average = WeightAverage(self.params, plan.average, plan.stall) if plan.average else None
        self.average = average
        self.budget = ForgettingBudget(
            model, setup, source, optimizer=optimizer, guards=guards, average=average
        )
        guards += [g for g in (source.replay, average, self.budget) if g is not None]
        self._micro_batches = MicroBatches(self.guards, ranks)

    def gather(self) -> None:
        """Give every process the whole network, if its weights are sharded; all have to call it.

        No step can follow, because the optimizer keeps the shards.
        """
        self._network.gather()

    # The loop.

    @property
    def params(self) -> list[Tensor]:
        """All parameters that are trained."""
        return self._optimizer.params

    @property
    def target_size(self) -> int:
        return self.plan.target_size

    def batches(self, start: int | None = None) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """The batches of whole steps, in the order of `fast.finetune`, to the end of the plan.

        With several processes, each gets its share of every batch.

        Args:
            start: number of the first step (default: steps done).

        Yields:
            inputs, labels and row numbers `[B]` (None from a DataLoader), as `train` has them.
        """
        start = self.done if start is None else start
        stream = self._batches.from_step(start, self.ranks.share)
        yield from itertools.islice(stream, max(0, self.plan.steps - start))
        self.plan.check_taken(self.done)

    def scheduler(self) -> LambdaLR:
        """The plan's learning-rate schedule, from the step that the adaptation has reached.

        It follows the optimizer's steps, however often it is stepped itself: Accelerate does so
        once for each process, and a loop that accumulates may for each micro-batch.
        """
        last = self.done - 1 if self.done else -1
        self._optimizer.keep_rates()
        # LambdaLR would save the attributes of any callable that is not a plain function.
        return LambdaLR(self.optimizer, lambda _: self.plan.lr_factor(self.done), last_epoch=last)

    def schedule(self) -> None:
        """Set the learning rates of the next step by the plan's schedule."""
        self._optimizer.schedule(self.plan.lr_factor(self.done))

    def forward(
        self, inputs: Any, rows: Tensor | None = None, *, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Target logits, and the penalty to add to the loss; source inputs ride in the same pass.

        With `grad_accum_steps`, each call takes one micro-batch, and the loop divides its loss and
        penalty by the number of micro-batches. With several processes, each takes its share of the
        batch, and the step's penalty is the mean of theirs.

        Args:
            inputs: target inputs `[B, ...]`, as the network takes them.
            rows: their row numbers in the training data `[B]`, if the inputs are the ones stored
                there; without them source answers come from a frozen copy of the network.
            model: the network in its wrapper (`DistributedDataParallel`, compiled).

        Returns:
            logits `[B, C]`, or whatever the network returns; and the penalty, `[]`.
        """
        parts = self.plan.grad_accum_steps
        if not self.done and self._part >= parts:
            self._optimizer.check_used()
        part, self._part = self._part % parts, self._part + 1
        batch = self._micro_batches.part(inputs, rows, step=self.done, part=part, parts=parts)
        logits, inside, outside = self.forward_part(batch, model)
        penalty = parts * (inside + outside)  # which the loop divides again
        if not self.done:
            self.guards.watch(penalty)
        return logits, penalty

    def parts(self, inputs: Any, rows: Tensor | None, size: int) -> list[MicroBatch]:
        """Split a step's batch into micro-batches of `size`, whose penalties add up to the batch's.

        Args:
            inputs: inputs of the whole batch, as the network will see them.
            rows: see `forward`.
        """
        return self._micro_batches.split(inputs, rows, step=self.done, size=size)

    def forward_part(
        self, batch: MicroBatch, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a micro-batch.

        Returns:
            target logits; the penalty that the reported loss includes, `[]`; and the penalty that
            it does not (replay), `[]`.
        """
        self._ran = True
        device = self._network.device
        inputs = move(batch.inputs, device)
        logits, features, source_features = self._network.forward(model, inputs, batch.source)
        seen = Seen(
            model=self.model,
            step=self.done,
            batch=batch,
            inputs=inputs,
            features=features,
            source_features=source_features,
        )
        return logits, *self.guards.penalties(seen, device)

    # What follows a step.

    def _before_step(self, *_: Any) -> None:
        self._check_outside("a step")
        if self.done == self._began:
            self._optimizer.check_loaded(self.done)
        self._optimizer.warn_left_out()
        self.guards.before_step(self.done, self._optimizer.rate)
        self.last_lr = self._optimizer.lr
        self._stepping = True

    def _after_step(self, *_: Any) -> None:
        # Where the step of an optimizer's class calls its base's, both hooks run twice.
        stepping, self._stepping = self._stepping, False
        if not stepping or self._optimizer.is_trial():
            return
        if self.done == 0:  # not before the step: Lightning computes gradients inside of it
            self._optimizer.check_averaged(self.ranks)
            if not self._ran:
                self.guards.warn_unseen("taken without adaptation.forward()")
            elif self.guards.penalised is False:
                self.guards.warn_unseen("of a loss without forward()'s penalty")
        if self.done == self.plan.steps:
            self.plan.warn_beyond()
        self.done += 1
        self._part = 0
        if self._network.norm is not None:
            self._network.norm.update_deferred(self.ranks)
        self.ranks.mean_(self._statistics)
        self.guards.after_step(self.done)
        self._optimizer.restrain(self.guards.lr_factor())
        if self.average is not None:
            self.average.keep()
        self._final = None
        if self.done == self.plan.steps:
            self._finish_weights()

    def _finish_weights(self) -> None:
        """Adopt the average and keep the budget, unless that is done and no weights were loaded
        since."""
        if self._final != dtensor.versions(self.params):
            self.guards.finish()
        self._final = dtensor.versions(self.params)

    def _check_outside(self, what: str) -> None:
        if self.average is not None:
            self.average.check_outside(what)

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged weights in place for the block: the run will return these."""
        return self.average.lent() if self.average else nullcontext()

    def stats(self) -> dict[str, Tensor]:
        """Figures of the last step: `grad_norm`, `update_norm`, `drift`, `forgetting`."""
        return self._optimizer.stats()

    def forecast(self) -> float | None:
        """How much the source is expected to have lost: see `ForgettingBudget.forecast`.

        With adapters this is 0 where nothing else is known.
        """
        value = self.budget.forecast()
        return 0.0 if value is None and self.plan.adapter_rank else value

    def finish(self) -> Result:
        """Adopt the average, keep the budget, and remove the hooks.

        The plan's last step has adopted the average and kept the budget. Where other weights were
        loaded since, these stay, with a warning, and the budget is kept again.

        Returns:
            the adapted model, in evaluation mode, with one record of drift and forecast.

        Raises:
            RuntimeError: the loop has stepped another optimizer; the weights stay as they are.
        """
        self._check_outside("finish()")
        if not self.done:
            self._optimizer.check_used()
        self._finish_weights()
        if self.ranks.first:
            self.plan.note_short(self.done)
        self.close()
        self.optimizer.zero_grad()
        self.model.eval()
        drift = self.drift()
        if not math.isfinite(drift):
            warn("the weights are not finite (NaN or infinite): the loop has diverged")
        forecast, lr = self.forecast(), self.last_lr
        record = unmeasured(step=self.done, drift=drift, forecast=forecast, grad_norm=None, lr=lr)
        self.gather()
        how = {"config": self.config, "plan": self.plan, "inputs": signature_of(self.sample)}
        return Result(model=self.model, history=[record], **how)

    def close(self) -> None:
        """Remove the hooks on the network, without which there is no penalty."""
        self._network.close()
        self._until_closed.close()

    # State.

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is adapted, and how: the options that decide what is computed, and hashes of the
        data, which are read for them once."""
        return run_facts(self.config, self._batches.data, self.source)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that neither the model's state nor the optimizer's holds.

        To resume, make an `Adaptation` of the pretrained network with the same arguments, then load
        the states of the model, of the optimizer, and this one.
        """
        self._check_outside("a state")
        return {
            "format": FORMAT,
            RUN: self.facts,
            "done": self.done,
            "guards": self.guards.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "head_start": self.head_start.state_dict() if self.head_start else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: the state belongs to another adaptation, or to another version of this
                library; nothing is changed then.
        """
        own = self.state_dict()
        check_state(state, own)
        state = sharded_as(state, own)
        self.done = self._began = int(state["done"])
        self._final = dtensor.versions(self.params) if self.done == self.plan.steps else None
        self._optimizer.load_state_dict(state["optimizer"])
        self.guards.load_state_dict(state["guards"])
        if self.head_start is not None:
            self.head_start.load_state_dict(state["head_start"])
        self._optimizer.restrain(self.guards.lr_factor())
