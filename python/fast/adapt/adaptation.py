"""`fast.Adaptation`: the method as an object, which any training loop can drive."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fast.adapt import prepare
from fast.adapt.card import CARD_SAMPLES, bound_card, estimate_card
from fast.adapt.checks import check_gradients
from fast.adapt.config import AdaptConfig, AdaptOptions
from fast.adapt.guards.base import Guard, Seen, SourceBatch
from fast.adapt.guards.budget import ForgettingBudget
from fast.adapt.guards.distill import Distillation
from fast.adapt.guards.forgetting import hold_back
from fast.adapt.guards.rehearse import Rehearsal
from fast.adapt.guards.replay import Replay
from fast.adapt.guards.weight_average import WeightAverage
from fast.adapt.head_start import start_head
from fast.adapt.loss import Loss
from fast.adapt.methods import METHODS
from fast.adapt.optimizer import AnchoredOptimizer, MakeOptimizer
from fast.adapt.result import Result
from fast.adapt.rollback import HeadStart, RollbackOnError
from fast.adapt.schedule import lr_factor
from fast.adapt.setup import Setup, settle
from fast.adapt.shared_forward import HeadInput, cuts_at_head, depends_on_mode, shares
from fast.adapt.state import check_state
from fast.curvature.card import SourceCard
from fast.data.labels import check_labels
from fast.data.source_inputs import target_inputs
from fast.data.trees import leaves, length, move, pick
from fast.heads import (
    find_head,
    folds_positions,
    forward_logits,
    has_batch_norm,
    own_parameters,
    set_batch_norm,
    source_task,
    task_head,
    unwrap,
)
from fast.heads.replace import put_head

log = logging.getLogger("fast")
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """A micro-batch, and what its share of the penalties is counted by.

    Attributes:
        inputs: of the target `[B, ...]`.
        places, remembered: see `fast.adapt.guards.base.Seen`.
        source: source inputs that ride along, or None.
        part, parts: which micro-batch of how many.
    """

    inputs: Any
    places: Tensor
    remembered: int
    source: SourceBatch | None
    part: int
    parts: int


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
        **options: the fields of `fast.adapt.config.AdaptConfig`: `method`, `steps`, `epochs`,
            `batch_size`, `lr`, `seed`, `head`, ...

    Attributes:
        optimizer: `fast.AdamW`, `fast.SGD`, or what `optimizer` returned.
        plan: the resolved settings.
        target_size: target samples of a step; with the source inputs that ride along it makes
            `batch_size`.
        guards: what holds the source.
        done: steps taken.

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
        optimizer: str | MakeOptimizer = "adamw",
        augmented: bool = False,
        autocast_dtype: torch.dtype | None = None,
        resuming: bool = False,
        **options: Unpack[AdaptOptions],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        check_gradients("Adaptation")
        make = None if isinstance(optimizer, str) else optimizer
        name = {"optimizer": optimizer} if isinstance(optimizer, str) else {}
        self.config = AdaptConfig(**options, **name)
        self.model = unwrap(model)
        self.done = 0
        self._micro_batches = 0
        self._pull_factor = 1.0
        with RollbackOnError(self.model):
            if card is not None and not isinstance(card, SourceCard):
                card = bound_card(card, self.model)
            setup = settle(
                self.config,
                self.model,
                train,
                num_classes=num_classes,
                source_inputs=source_inputs,
                has_card=card is not None,
                any_labels=loss is not None and not isinstance(loss, Loss),
            )
            self._set_up(
                setup, card, loss or Loss(None, 0.0), make, augmented, autocast_dtype, resuming
            )

    def _set_up(
        self,
        setup: Setup,
        card: SourceCard | None,
        loss: Callable[[Tensor, Tensor], Tensor],
        make: MakeOptimizer | None,
        augmented: bool,
        autocast_dtype: torch.dtype | None,
        resuming: bool,
    ) -> None:
        """Measure the source at the pretrained weights, then change the network."""
        config, plan, model = self.config, setup.plan, self.model
        self.num_classes, self._batches = setup.num_classes, setup.batches
        self.source, meter = setup.source, None
        budget = config.budget
        if self.source is not None:
            self.source, meter = hold_back(
                model, self.source, budget=budget, skill=config.source_skill
            )
        self.held_back = meter.samples if meter is not None else None
        weighted = plan.weighted and METHODS[config.method].card_decay is not None
        if card is None and plan.weighted and not resuming:
            card = self._own_card(setup)
        replay = None
        if METHODS[config.method].replay:
            if self.source is None:
                raise ValueError("method 'replay' trains on source inputs: pass source_inputs=")
            replay = Replay(
                model=model, samples=self.source, batch_size=setup.batch_size, seed=config.seed
            )
        device = next(model.parameters()).device
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            penalties = self._change_network(setup, loss, augmented, resuming)
        self._anchored = AnchoredOptimizer(
            model=model,
            plan=plan,
            card=card if weighted else None,
            optimizer=make,
            sample=setup.sample,
            own_lr=config.lr is not None,
        )
        self.optimizer: Optimizer = self._anchored.optimizer
        self.plan, self.drift = self._anchored.plan, self._anchored.drift
        self.average: WeightAverage | None = None
        if plan.average:
            self.average = WeightAverage(self._anchored.params, plan.average, plan.stall)
        self.budget = ForgettingBudget(
            model=model,
            plan=plan,
            batch_size=setup.batch_size,
            budget=budget,
            meter=meter,
            card=card,
            weighted=weighted,
            stats=self._anchored.stats,
            drift=self.drift,
            average=self.average,
            set_pull=self.set_pull,
        )
        after = [replay, self.average, self.budget]
        self.guards: list[Guard] = [*penalties, *(g for g in after if g is not None)]
        self.head_start = HeadStart(model, self.drift) if plan.head_steps else None
        self.last_lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)

    def _own_card(self, setup: Setup) -> SourceCard:
        samples = self.source
        if samples is None:  # `ewc` without source inputs
            samples = target_inputs(setup.batches, CARD_SAMPLES[1])
        seen = setup.plan.steps * setup.batch_size
        return estimate_card(self.model, samples, seen=seen, seed=self.config.seed)

    def _change_network(
        self,
        setup: Setup,
        loss: Callable[[Tensor, Tensor], Tensor],
        augmented: bool,
        resuming: bool,
    ) -> list[Guard]:
        """The head, calibrated and taught; the guards that hold the function."""
        config, plan, model, batches = self.config, setup.plan, self.model, setup.batches
        self._put_head(setup)
        prepare.check_backbone(
            model, own_parameters(model, self._own), METHODS[config.method].replay, config.method
        )
        set_batch_norm(model, plan.batch_norm)
        if plan.batch_norm == "per_task" and not resuming:
            prepare.calibrate_batch_norm(model, batches)
        rehearsed = setup.own if setup.own is not None else self.source
        rehearses = bool(plan.rehearse) and rehearsed is not None and bool(plan.source_size)
        folded = bool(plan.distill or rehearses) and folds_positions(
            model, self._head, setup.sample
        )
        remembers = bool(plan.distill) and not augmented and prepare.same_at_each_visit(batches)
        if remembers or not resuming:
            first = prepare.first_pass(
                model,
                self._head,
                self._source_layer,
                None if resuming else self._norm,
                batches,
                plan=plan,
                remembers=remembers,
            )
        if self._norm is not None:
            self._norm.deferred = True
        task = task_head(model)
        if plan.head_steps and not resuming and task is not None:
            labels = first.labels
            if isinstance(loss, Loss):
                labels = check_labels(labels, self.num_classes, "train")
            start_head(
                task,
                first.features,
                labels.to(first.features.device),
                loss=loss,
                steps=plan.head_steps,
                seed=config.seed,
            )
        guards: list[Guard] = []
        self._distillation: Distillation | None = None
        self._apart = False
        if plan.distill:
            self._distillation = Distillation(
                source=self._source_layer,
                weight=plan.distill,
                remembered=first.remembered if remembers else None,
                frozen_copy=self._frozen_copy,
            )
            guards.append(self._distillation)
        if rehearses:
            with source_task(model):
                guards.append(
                    Rehearsal(
                        model=model,
                        head=self._head,
                        samples=rehearsed,
                        name="train" if setup.own is not None else "source_inputs",
                        size=plan.source_size,
                        weight=plan.rehearse,
                        seed=config.seed,
                    )
                )
            few = move(rehearsed.part(0, 8).inputs, next(model.parameters()).device)
            self._apart = (
                (plan.batch_norm == "per_task" and has_batch_norm(model))
                or folded
                or depends_on_mode(model, self._head, few)
                or not cuts_at_head(model, self._head, setup.sample, few)
            )
        self._head_input = HeadInput(self._head) if guards else None
        return guards

    def _put_head(self, setup: Setup) -> None:
        """The module whose input the features are, and the layers of target and source in it."""
        config, model = self.config, self.model
        self._norm = None
        if config.keeps_head:
            self._head = self._own = self._source_layer = find_head(model, setup.sample).module
            return
        put_head(
            model,
            self.num_classes,
            sample=setup.sample,
            max_entropy=setup.plan.max_entropy,
            head=config.head_name,
        )
        head = task_head(model)
        assert head is not None
        self._head, self._own, self._source_layer = head, head.linear, head.source
        self._norm = head.norm

    def _frozen_copy(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The network at the pretrained weights, its head, and the source's layer in it."""
        names = {id(module): name for name, module in self.model.named_modules()}
        copied = copy.deepcopy(self.model).requires_grad_(False)
        if self.done:
            params = dict(zip(map(id, self.drift.params), self.drift.anchors, strict=True))
            for p, q in zip(self.model.parameters(), copied.parameters(), strict=True):
                if id(p) in params:
                    q.copy_(params[id(p)])
        head, source = (
            copied.get_submodule(names[id(m)]) for m in (self._head, self._source_layer)
        )
        return copied, head, source

    # The loop.

    @property
    def params(self) -> list[Tensor]:
        """All parameters that are trained."""
        return self._anchored.params

    @property
    def target_size(self) -> int:
        return self.plan.target_size

    def batches(self, start: int | None = None) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Training batches in the order of `fast.finetune`, to the end of the plan.

        Args:
            start: number of the first step (default: steps done).

        Yields:
            inputs, labels and row numbers `[B]` (None from a DataLoader), as they are in `train`.
        """
        start = self.done if start is None else start
        yield from itertools.islice(self._batches.from_step(start), max(0, self.plan.steps - start))

    def scheduler(self) -> LambdaLR:
        """The plan's learning-rate schedule, at the step that the adaptation is at."""
        plan = self.plan

        def factor(step: int) -> float:
            return lr_factor(plan.schedule, step, plan.steps, plan.warmup)

        last = self.done - 1 if self.done else -1
        return LambdaLR(self.optimizer, factor, last_epoch=last)

    def schedule(self) -> None:
        """Set the learning rates of the next step by the plan's schedule."""
        plan = self.plan
        factor = lr_factor(plan.schedule, self.done, plan.steps, plan.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def forward(
        self, inputs: Any, rows: Tensor | None = None, *, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Target logits, and the penalty to add to the loss; source inputs ride in the same pass.

        Where the plan has `grad_accum_steps`, each call takes one micro-batch, whose loss and
        penalty the loop divides by their number.

        Args:
            inputs: target inputs `[B, ...]`, as the network takes them.
            rows: their row numbers in the training data `[B]`, where the inputs are as they are
                there; without them source answers come from a frozen copy of the network.
            model: the network as it is wrapped (`DistributedDataParallel`, compiled).

        Returns:
            logits `[B, C]`, or what the network gives; and the penalty, `[]`.
        """
        parts = self.plan.grad_accum_steps
        part = self._micro_batches % parts
        self._micro_batches += 1
        if self._distillation is not None and rows is not None:
            self._check_rows(inputs, rows)
        places = self._places(inputs, rows)
        source = shares(self._source_batch(), parts)[part]
        if source is not None:
            source = SourceBatch(
                inputs=source.inputs, reference=source.reference, total=source.total / parts
            )
        logits, penalties = self._run(
            Part(
                inputs=inputs,
                places=places,
                remembered=int((places >= 0).sum()),
                source=source,
                part=part,
                parts=parts,
            ),
            model,
        )
        return logits, sum(penalties, torch.zeros((), device=logits.device))

    def parts(self, inputs: Any, rows: Tensor | None, size: int) -> list[Part]:
        """A step's batch in micro-batches of `size`, whose penalties add up to the batch's.

        Args:
            inputs: of the whole batch, as the network will see them.
            rows: see `forward`.
        """
        places = self._places(inputs, rows)
        count = math.ceil(length(inputs) / size)
        sources = shares(self._source_batch(), count)
        return [
            Part(
                inputs=pick(inputs, slice(i * size, (i + 1) * size)),
                places=places[i * size : (i + 1) * size],
                remembered=int((places >= 0).sum()),
                source=source,
                part=i,
                parts=count,
            )
            for i, source in enumerate(sources)
        ]

    def forward_part(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Run a micro-batch that `parts` made.

        Returns:
            target logits; the penalty that belongs to the reported loss, `[]`; and the one that
            does not (replay), `[]`.
        """
        logits, penalties = self._run(part, None)
        return logits, *penalties

    def _run(self, part: Part, model: nn.Module | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        device = next(self.model.parameters()).device
        inputs = move(part.inputs, device)
        network = self.model if model is None else model
        features, source_features = torch.empty(0, device=device), None
        if self._head_input is None:
            logits = forward_logits(network, inputs)
        else:
            source = None if part.source is None else move(part.source.inputs, device)
            logits, features, source_features = self._head_input.forward(
                network, inputs, source, self._apart
            )
        seen = Seen(
            model=self.model,
            step=self.done,
            part=part.part,
            parts=part.parts,
            inputs=inputs,
            places=part.places,
            remembered=part.remembered,
            features=features,
            source=part.source,
            source_features=source_features,
        )
        inside, outside = torch.zeros((), device=device), torch.zeros((), device=device)
        for guard in self.guards:
            penalty = guard.penalty(seen)
            if penalty is not None and guard.in_loss:
                inside = inside + penalty
            elif penalty is not None:
                outside = outside + penalty
        return logits, (self._pull_factor * inside, outside)

    def _places(self, inputs: Any, rows: Tensor | None) -> Tensor:
        if self._distillation is None:
            return torch.full((length(inputs),), -1)
        return self._distillation.places(rows, inputs)

    def _source_batch(self) -> SourceBatch | None:
        batches = (guard.source_batch(self.done) for guard in self.guards)
        return next((batch for batch in batches if batch is not None), None)

    def _check_rows(self, inputs: Any, rows: Tensor) -> None:
        """Answers that are remembered by row hold for the inputs of these rows alone."""
        distillation, data = self._distillation, self._batches.data
        if distillation is None or distillation.live or data.inputs is None:
            return
        own = leaves(move(pick(data.inputs, rows.cpu()), leaves(inputs)[0].device))
        same = all(
            a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(leaves(inputs), own, strict=True)
        )
        if not same:
            log.info(
                "the inputs of these rows are not those of the training data: source answers come "
                "from a frozen copy of the network from now on"
            )
            distillation.go_live()

    # What follows a step.

    def _before_step(self, *_: Any) -> None:
        group = self.optimizer.param_groups[0]
        self.last_lr = float(group["lr"]) * group["restraint"]

    def _after_step(self, *_: Any) -> None:
        self.done += 1
        self._micro_batches = 0
        if self._norm is not None:
            self._norm.update_deferred()
        for guard in self.guards:
            guard.after_step(self.done)
        self._anchored.restrain(math.prod(guard.lr_factor() for guard in self.guards))
        if self.done == self.plan.steps:
            self._finish_guards()

    def _finish_guards(self) -> None:
        for guard in self.guards:
            guard.finish()

    def set_pull(self, factor: float) -> None:
        """Multiply what holds the source: the pull of the optimizer, and the penalties."""
        self._pull_factor = factor
        self._anchored.set_pull(factor)
        for guard in self.guards:
            guard.strength = factor

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in place, as the run will return them."""
        return self.average.applied() if self.average else nullcontext()

    def stats(self) -> dict[str, Tensor]:
        """Figures of the last step: `grad_norm`, `update_norm`, `drift`, `forgetting`."""
        return self._anchored.stats()

    def forecast(self) -> float | None:
        """Forecast of what the source has lost: see `ForgettingBudget.forecast`."""
        return self.budget.forecast()

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
        return Result(model=self.model, history=[record], config=self.config, plan=self.plan)

    def close(self) -> None:
        """Remove what watches the head; the penalty ends with it."""
        if self._head_input is not None:
            self._head_input.close()
        if self._norm is not None:
            self._norm.stop_deferring()
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
            "optimizer": self._anchored.state_dict(),
            "head_start": self.head_start.state_dict() if self.head_start else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another adaptation; nothing is changed then.
        """
        check_state(state, self.state_dict())
        self.done = int(state["done"])
        self._anchored.load_state_dict(state["optimizer"])
        for guard in self.guards:
            guard.load_state_dict(state["guards"][type(guard).__name__])
        if self.head_start is not None:
            self.head_start.load_state_dict(state["head_start"])
        self._anchored.restrain(math.prod(guard.lr_factor() for guard in self.guards))
