"""`fast.Adaptation`: the method as an object, which any training loop can drive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fast.adapt.config import AdaptConfig, AdaptOptions, OptimizerName
from fast.adapt.guards.base import Guard, MicroBatch, Seen
from fast.adapt.guards.budget import ForgettingBudget
from fast.adapt.guards.weight_average import WeightAverage
from fast.adapt.loss import Loss
from fast.adapt.methods import METHODS
from fast.adapt.network.adapted import AdaptedNetwork
from fast.adapt.network.micro_batches import MicroBatches
from fast.adapt.network.prepare import prepare
from fast.adapt.network.rollback import HeadStart, RollbackOnError
from fast.adapt.optimizer import AdaptedOptimizer, MakeOptimizer
from fast.adapt.result import Result
from fast.adapt.setup import check_gradients, check_model, check_ranks, settle
from fast.adapt.source import bound_card, measure_source
from fast.adapt.state import check_state, sharded_as
from fast.curvature.card import SourceCard
from fast.data.dataset import Data
from fast.data.trees import move
from fast.heads import running_statistics, unwrap
from fast.models.signature import signature_of
from fast.ranks import AUTO, Ranks, tensors_of

FORMAT = 1


class Adaptation:
    """Adapts a pretrained network to a target task, and holds what it knew.

    The object has no loop. The loop takes its optimizer, passes inputs through `forward`, and adds
    the penalty to its own loss; everything that follows a step hangs on the step hooks of the
    optimizer. Schedulers, gradient scalers and accumulation are the loop's:

        adaptation = fast.Adaptation(model, (x, y), source_inputs=kept, steps=1000, batch_size=64)
        optimizer, scheduler = adaptation.optimizer, adaptation.scheduler()
        model.train()
        for inputs, labels, rows in adaptation.batches():
            logits, penalty = adaptation.forward(inputs, rows)
            (F.cross_entropy(logits, labels) + penalty).backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
        result = adaptation.finish()

    This gives the weights of `fast.finetune`, bit for bit, after `torch.manual_seed(seed)`.

    The model is changed in place: it gets a new head (`head="keep"`: it goes on with its own),
    which is taught on the features of training inputs before the first step. When the constructor
    fails, the model is as it was.

    Args:
        model: a pretrained network, on the device it is trained on.
        train: training data: `(inputs, labels)`, a map-style Dataset or a DataLoader. The loop may
            read them in any way; here they calibrate the head, teach it, and give the inputs whose
            source answers or features are kept.
        num_classes: C, outputs of the new head (default: from the labels).
        source_inputs: a few hundred source inputs, with labels or without: see `fast.finetune`.
        card: a `fast.SourceCard` of this checkpoint, or its file.
        loss: `loss(logits, labels)`, the mean over a batch, that teaches the head before the first
            step. Default: cross-entropy, and labels are class indices `[N]`. With any other loss
            labels may be anything that it takes (several labels, numbers, positions).
        optimizer: "adamw" or "sgd", fused; or a function of parameter groups that returns any
            `torch.optim.Optimizer`, to which the pull is added unfused.
        augmented: the loop changes inputs between visits (augmentation, Mixup), so that source
            answers cannot be remembered by row.
        autocast_dtype: of the passes before the first step; None for full precision.
        resuming: a state will be loaded before the first step: what it holds is not computed.
        process_group: the processes that train together, each on its share of every batch (see
            docs/distributed.md). `"auto"`: all of them, where torch.distributed is initialised;
            None: this one alone. Each is given the same data and options.
        **options: the fields of `fast.adapt.config.AdaptConfig`: `method`, `steps`, `epochs`,
            `batch_size`, `lr`, `seed`, `head`, ...

    Attributes:
        optimizer: `fast.AdamW`, `fast.SGD`, or what `optimizer` returned.
        plan: the resolved settings.
        target_size: target samples of a step; with the source inputs that ride along it makes
            `batch_size`.
        guards: what holds the source.
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
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: OptimizerName | MakeOptimizer = "adamw",
        augmented: bool = False,
        autocast_dtype: torch.dtype | None = None,
        resuming: bool = False,
        process_group: Any = AUTO,
        **options: Unpack[AdaptOptions],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        check_gradients("Adaptation")
        make = None if isinstance(optimizer, str) else optimizer
        name = {"optimizer": optimizer} if isinstance(optimizer, str) else {}
        self.config = AdaptConfig(**options, **name)
        self.model = unwrap(model)
        self.ranks = ranks = Ranks(process_group)
        if isinstance(model, DistributedDataParallel) and not self.config.keeps_head:
            raise ValueError(
                "model is in DistributedDataParallel already, which would not know the new head: "
                "wrap it after fast.Adaptation, and pass it to forward(..., model=)"
            )
        if not isinstance(train, Data):  # whoever read it has checked the network
            check_model(self.model)
        self.done = 0
        self._part = 0  # of this step's micro-batches, the next
        self._pull_factor = 1.0
        with RollbackOnError(self.model):
            ranks.copy_from_first(tensors_of(self.model))
            with ranks.together():
                bound = None if card is None else bound_card(card, self.model)
                setup = settle(
                    self.config,
                    self.model,
                    train,
                    num_classes=num_classes,
                    source_inputs=source_inputs,
                    has_card=card is not None,
                    any_labels=loss is not None and not isinstance(loss, Loss),
                )
            check_ranks(setup, ranks, self.config.shard)
            self.num_classes, self._batches = setup.num_classes, setup.batches
            self.sample = setup.sample
            # The source is measured at the pretrained weights, before the network changes.
            source = measure_source(
                self.model, setup, self.config, card=bound, resuming=resuming, ranks=ranks
            )
            self.source = source.samples
            self.held_back = source.meter.samples if source.meter is not None else None
            with (
                ranks.together(),
                torch.autocast(
                    setup.device.type, autocast_dtype, enabled=autocast_dtype is not None
                ),
            ):
                self._network = AdaptedNetwork(
                    self.model,
                    None if self.config.keeps_head else setup.num_classes,
                    sample=setup.sample,
                    max_entropy=setup.plan.max_entropy,
                    head_name=self.config.head_name,
                )
                distillation, rehearsal = prepare(
                    self._network,
                    setup,
                    samples=source.samples,
                    loss=loss or Loss(None, 0.0),
                    augmented=augmented,
                    resuming=resuming,
                    seed=self.config.seed,
                    ranks=ranks,
                )
            ranks.copy_from_first(tensors_of(self.model))
            if self.config.shard and ranks.size > 1:
                self._network.shard(setup.sample, ranks)
            weighted = setup.plan.weighted and METHODS[self.config.method].card_decay is not None
            self._optimizer = AdaptedOptimizer(
                model=self.model,
                plan=setup.plan,
                card=source.card if weighted else None,
                optimizer=make,
                sample=setup.sample,
                own_lr=self.config.lr is not None,
            )
            self.optimizer: Optimizer = self._optimizer.optimizer
            self.plan = plan = self._optimizer.plan
            self.drift = self._network.drift = self._optimizer.drift
            self.head_start = HeadStart(self.model, self.drift) if plan.head_steps else None
            self.last_lr = float(self.optimizer.param_groups[0]["lr"])
            self.average = None
            if plan.average:
                self.average = WeightAverage(self.params, plan.average, plan.stall)
            self.budget = ForgettingBudget(
                model=self.model,
                plan=plan,
                batch_size=setup.batch_size,
                budget=self.config.budget,
                meter=source.meter,
                card=source.card,
                weighted=weighted,
                stats=self.stats,
                drift=self.drift,
                average=self.average,
                set_pull=self.set_pull,
                ranks=ranks,
            )
            tracked = plan.batch_norm != "frozen"
            self._statistics = running_statistics(self.model) if tracked else []
            guards = (distillation, rehearsal, source.replay, self.average, self.budget)
            self.guards: list[Guard] = [guard for guard in guards if guard is not None]
            self._micro_batches = MicroBatches(self.guards, ranks)
            self.optimizer.register_step_pre_hook(self._before_step)
            self.optimizer.register_step_post_hook(self._after_step)

    def gather(self) -> None:
        """Give every process the whole network, where its weights are sharded; the last thing to
        be done, since the optimizer's are the shards. All processes have to call it."""
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
        """Training batches in the order of `fast.finetune`, to the end of the plan; of several
        processes, each gets its share of every batch.

        Args:
            start: number of the first step (default: steps done).

        Yields:
            inputs, labels and row numbers `[B]` (None from a DataLoader), as they are in `train`.
        """
        start = self.done if start is None else start
        stream = self._batches.from_step(start, self.ranks.share)
        yield from itertools.islice(stream, max(0, self.plan.steps - start))

    def scheduler(self) -> LambdaLR:
        """The plan's learning-rate schedule, at the step that the adaptation is at."""
        last = self.done - 1 if self.done else -1
        # A function: what else can be called has its attributes saved with the scheduler's state.
        return LambdaLR(self.optimizer, lambda s: self.plan.lr_factor(s), last_epoch=last)

    def schedule(self) -> None:
        """Set the learning rates of the next step by the plan's schedule."""
        factor = self.plan.lr_factor(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def forward(
        self, inputs: Any, rows: Tensor | None = None, *, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Target logits, and the penalty to add to the loss; source inputs ride in the same pass.

        Where the plan has `grad_accum_steps`, each call takes one micro-batch, whose loss and
        penalty the loop divides by their number. Of several processes, each takes its share of the
        batch, and the penalties are such that their mean over the processes is the step's.

        Args:
            inputs: target inputs `[B, ...]`, as the network takes them.
            rows: their row numbers in the training data `[B]`, where the inputs are as they are
                there; without them source answers come from a frozen copy of the network.
            model: the network as it is wrapped (`DistributedDataParallel`, compiled).

        Returns:
            logits `[B, C]`, or what the network gives; and the penalty, `[]`.
        """
        parts = self.plan.grad_accum_steps
        part, self._part = self._part % parts, self._part + 1
        batch = self._micro_batches.part(inputs, rows, step=self.done, part=part, parts=parts)
        logits, inside, outside = self.forward_part(batch, model)
        return logits, inside + outside

    def parts(self, inputs: Any, rows: Tensor | None, size: int) -> list[MicroBatch]:
        """A step's batch in micro-batches of `size`, whose penalties add up to the batch's.

        Args:
            inputs: of the whole batch, as the network will see them.
            rows: see `forward`.
        """
        return self._micro_batches.split(inputs, rows, step=self.done, size=size)

    def forward_part(
        self, batch: MicroBatch, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a micro-batch.

        Returns:
            target logits; the penalty that belongs to the reported loss, `[]`; and the one that
            does not (replay), `[]`.
        """
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
        inside, outside = torch.zeros((), device=device), torch.zeros((), device=device)
        for guard in self.guards:
            penalty = guard.penalty(seen)
            if penalty is not None and guard.in_loss:
                inside = inside + penalty
            elif penalty is not None:
                outside = outside + penalty
        return logits, self._pull_factor * inside, outside

    # What follows a step.

    def _before_step(self, *_: Any) -> None:
        group = self.optimizer.param_groups[0]
        self.last_lr = float(group["lr"]) * group["restraint"]

    def _after_step(self, *_: Any) -> None:
        self.done += 1
        self._part = 0
        if self._network.norm is not None:
            self._network.norm.update_deferred(self.ranks)
        self.ranks.mean_(self._statistics)
        for guard in self.guards:
            guard.after_step(self.done)
        self._restrain()
        if self.done == self.plan.steps:
            self._finish_guards()

    def _restrain(self) -> None:
        self._optimizer.restrain(math.prod(guard.lr_factor() for guard in self.guards))

    def _finish_guards(self) -> None:
        for guard in self.guards:
            guard.finish()

    def set_pull(self, factor: float) -> None:
        """Multiply what holds the source: the pull of the optimizer, and the penalties."""
        self._pull_factor = factor
        self._optimizer.set_pull(factor)
        for guard in self.guards:
            guard.strength = factor

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in place, as the run will return them."""
        return self.average.applied() if self.average else nullcontext()

    def stats(self) -> dict[str, Tensor]:
        """Figures of the last step: `grad_norm`, `update_norm`, `drift`, `forgetting`."""
        return self._optimizer.stats()

    def forecast(self) -> float | None:
        """Forecast of what is lost, see `ForgettingBudget.forecast`; with adapters nothing."""
        value = self.budget.forecast()
        return 0.0 if value is None and self.plan.adapter_rank else value

    def finish(self) -> Result:
        """Adopt the average and keep the budget, where the last step has not; stop watching.

        Returns:
            the adapted model, in evaluation mode, with one record of drift and forecast.
        """
        if self.done < self.plan.steps:
            self._finish_guards()
        self.close()
        self.optimizer.zero_grad()
        self.model.eval()
        record = {
            "step": self.done,
            "loss": None,
            "target_accuracy": None,
            "source_accuracy": None,
            "forecast": self.forecast(),
            "drift": self.drift(),
            "lr": self.last_lr,
        }
        self.gather()
        how = {"config": self.config, "plan": self.plan, "inputs": signature_of(self.sample)}
        return Result(model=self.model, history=[record], **how)

    def close(self) -> None:
        """Remove what watches the head; the penalty ends with it."""
        self._network.close()
        for guard in self.guards:
            guard.close()

    # State.

    def state_dict(self) -> dict[str, Any]:
        """What neither the model's state nor the optimizer's holds: tensors and plain values.

        To go on, make an `Adaptation` of the pretrained network with the same arguments, then load
        the states of the model, of the optimizer and this one.
        """
        return {
            "format": FORMAT,
            "done": self.done,
            "guards": {type(g).__name__: g.state_dict() for g in self.guards},
            "optimizer": self._optimizer.state_dict(),
            "head_start": self.head_start.state_dict() if self.head_start else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another adaptation; nothing is changed then.
        """
        own = self.state_dict()
        check_state(state, own)
        state = sharded_as(state, own)
        self.done = int(state["done"])
        self._optimizer.load_state_dict(state["optimizer"])
        for guard in self.guards:
            guard.load_state_dict(state["guards"][type(guard).__name__])
        if self.head_start is not None:
            self.head_start.load_state_dict(state["head_start"])
        self._restrain()
