"""The loop behind every method of `fast.finetune`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.config import TrainConfig
from fast.adapt.guards.protect import Protection, hold_back, make_card
from fast.adapt.guards.rehearse import OWN_INPUTS, make_room
from fast.adapt.guards.replay import Replay, replay_loss
from fast.adapt.guards.weight_average import Average
from fast.adapt.head_start import head_is_last
from fast.adapt.job import Job
from fast.adapt.loss import Loss, class_weights
from fast.adapt.methods import LEAST_FOR_STATISTICS, METHODS, plan_for, rehearsed_by, steps_for
from fast.adapt.prepare import Drift, make_optimizer, prepare_model
from fast.adapt.rollback import HeadStart
from fast.adapt.schedule import lr_factor
from fast.adapt.shared_forward import shares
from fast.curvature.card import SourceCard
from fast.data.augment import Augmentation, Transform
from fast.data.dataset import Data, as_data
from fast.data.finite import check_finite_inputs
from fast.data.generators import find_generators
from fast.data.labels import check_labels, check_num_classes
from fast.data.source_inputs import LEAST, target_inputs
from fast.data.trees import join, length, move, pick
from fast.files import reading
from fast.heads import (
    forward_logits,
    has_batch_norm,
    source_task,
    task_head,
)
from fast.heads.forward import check_takes
from fast.train.device import pick_device
from fast.train.early_stopping import EarlyStopping
from fast.train.finite import check_data, check_finite, warn_diverged
from fast.train.interrupt import Interruption
from fast.train.log import History, RunLog, log, progress_bar, read_history, summary
from fast.train.metrics import Evaluator, Score, evaluate
from fast.train.precision import autocast_dtype
from fast.train.result import Result
from fast.train.resume.checkpoint import Facts, State, load_checkpoint, save_checkpoint
from fast.train.resume.identity import (
    card_identity,
    code_identity,
    data_identity,
    environment,
    model_identity,
)
from fast.train.resume.run_folder import RunFolder, options_of, run_of

# Inputs, labels, rows of the training data (None from a loader); source inputs with what they are
# held to, or None.
Batch = tuple[Any, Tensor, Tensor | None, tuple[Any, Tensor] | None]


class Trainer:
    """One run, set up by the constructor; `fast.train.finetune` is the way in and documents it."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        train: Any,
        val: Any,
        source: Any,
        num_classes: int | None,
        transform: Transform | None,
        card: SourceCard | None = None,
        source_inputs: Any = None,
        folder: RunFolder | None = None,
    ) -> None:
        self.config, self.transform, self.folder = config, transform, folder
        self.train_data = as_data(train, "train")
        check_data(self.train_data)
        self.val = None if val is None else as_data(val, "val")
        self.source: Data | Evaluator | None = source
        if source is not None and not callable(source):
            self.source = as_data(source, "source")
        self.num_classes = _classes(self.train_data, num_classes)
        for data in (self.train_data, self.val):
            if data is not None and data.labels is not None:
                check_labels(data.labels, self.num_classes, data.name)
        if config.patience is not None and self.val is None:
            raise ValueError("patience needs val: early stopping watches the validation accuracy")

        self.device = pick_device(config.device)
        rehearsed = rehearsed_by(config, source_inputs is not None)
        self.batches, self.source_size = make_room(
            self.train_data, config.batch_size, config.seed, rehearsed
        )
        self.rehearsed = rehearsed if self.source_size else ""
        self.batch_size = self.batches.given_size or config.batch_size
        if config.batch_size not in (self.batch_size, TrainConfig.batch_size):
            warnings.warn(
                f"batch_size={config.batch_size} is not used: train is a DataLoader, with batches "
                f"of {self.batch_size}",
                stacklevel=3,
            )
        self.steps = steps_for(config, self.batches)
        self.eval_every = config.eval_every or max(1, self.steps // 10)
        weights = class_weights(config.class_weights, self.train_data, self.num_classes)
        if weights is not None:
            weights = weights.to(self.device)
        self.loss = Loss(weights, config.label_smoothing)

        self.autocast_dtype = autocast_dtype(config.precision, self.device)
        self.model = model.to(self.device)
        self.augment = Augmentation(transform, partial(check_takes, self.model, name="transform"))
        self.identity: dict[str, str | None] = {}
        if self.folder is not None:
            self.environment = environment(self.device, transform)
            self.generators = find_generators(
                train=train, val=val, source=source, transform=transform, model=model
            )
            self.identity = code_identity(model, transform) | {
                "pretrained weights (hash)": model_identity(model),
                "training data (hash)": data_identity(self.train_data),
                "validation data (hash)": data_identity(self.val),
                "source data (hash)": data_identity(self.source),
            }
        self.before = self._source_score()
        self._prepare(card, source_inputs)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.autocast_dtype == torch.float16
        )
        self.stopping = EarlyStopping(config.patience)
        self._began: Callable[[], None] = lambda: None
        self.started = time.monotonic()

    def _prepare(self, card: SourceCard | None, source_inputs: Any) -> None:
        """What is measured at the pretrained weights, and then the new head and the optimizer."""
        config, model = self.config, self.model
        source_inputs, gauge = hold_back(config, model, source_inputs)
        given = card is not None
        seen = self.steps * self.batch_size
        card = make_card(config, model, card, source_inputs, self.batches, seen)
        if self.folder is not None:
            self.identity["source inputs (hash)"] = data_identity(source_inputs)
            held = data_identity(gauge.samples) if gauge is not None else None
            self.identity["held-back source inputs (hash)"] = held
            self.identity["card"] = card_identity(card) if card is not None and given else None
        self.replay: Replay | None = None
        if METHODS[config.method].replay:
            if source_inputs is None:
                raise ValueError("method 'replay' trains on source inputs: pass source_inputs=")
            size = self.batch_size
            self.replay = Replay(model, source_inputs, size, config.seed, self.device)
        sample = move(self._first_inputs(), self.device)
        rehearsed = source_inputs if self.rehearsed else None
        if self.rehearsed == "target inputs":
            rehearsed = target_inputs(self.batches, min(OWN_INPUTS, self.steps * self.source_size))
            if rehearsed.size < LEAST:  # of one shape, too few to say how much features vary
                self.rehearsed, self.source_size, rehearsed = "", 0, None
        check_takes(model, sample, "train")
        last = head_is_last(model, sample, config.head)
        if config.head_steps and not last:
            raise ValueError(
                "head_steps: something follows the head of this network, so that it cannot learn "
                "from its features alone; use stall="
            )
        self.plan = plan = plan_for(
            config,
            steps=self.steps,
            target_size=self.batches.batch_size,
            source_size=self.source_size,
            weighted=card is not None,
            head_is_last=last,
            rehearsed=self.rehearsed,
            batch_norms=has_batch_norm(model)
            and self.batches.batch_size // config.grad_accum_steps >= LEAST_FOR_STATISTICS,
        )
        job = Job(
            config,
            plan,
            model,
            self.num_classes,
            self.batches,
            self.batch_size,
            self.steps,
            self.loss,
            sample,
            rehearsed,
            self.transform is not None,
        )
        with self._autocast():
            self.function_pull = prepare_model(job)
        self.head = task_head(model)
        self.optimizer = make_optimizer(
            model, config, plan, card if METHODS[config.method].card_decay is not None else None
        )
        self.drift = Drift(self.optimizer)
        self.average: Average | None = None
        if plan.average:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.average = Average(trained, plan.average)
        self.protection = Protection(
            job, card, gauge, self.optimizer, self.drift, self.function_pull, self.average
        )
        self.stall, self.lr = plan.stall, plan.lr
        # What a run without a better end goes back to.
        self.head_start = HeadStart(model, self.drift) if plan.head_steps and self.val else None

    def _first_inputs(self) -> Any:
        """Of the first batch, or of the first two where that is a single sample."""
        stream = self.batches.from_step(0)
        inputs, _, index = next(stream)
        if self.train_data.inputs is None:
            check_finite_inputs(inputs, "train", index)
        if length(inputs) > 1 or self.batches.steps_per_epoch == 1:
            return inputs
        both = join(inputs, next(stream)[0])
        return inputs if both is None else both

    def run(self, began: Callable[[], None] = lambda: None) -> Result:
        """Train to the end.

        Args:
            began: called before weights change, after all that can be checked beforehand.
        """
        self._began = began
        count = self.train_data.num_samples
        log.info("%s; %s classes, %s training samples", self.plan, self.num_classes, count)
        try:
            first, earlier, losses = self._resume()
            if self.folder is not None:
                self.folder.start()
            run_log = RunLog(self.folder.path if self.folder else None, earlier)
            bar = progress_bar(self.config.progress, first, self.steps, self.config.method)
            self._train(first, losses, run_log, bar)
        finally:
            if self.function_pull:
                self.function_pull.close()
            if self.head is not None and self.head.norm is not None:
                self.head.norm.stop_deferring()
        history = run_log.history
        warn_diverged(history[-1]["loss"], self.num_classes)
        self.stopping.restore(self.model)
        chosen = self.stopping.best
        if self.head_start is not None:
            chosen = self.head_start.better(history[0], chosen or history[-1]) or chosen
        self.optimizer.zero_grad()
        self.model.eval()
        return Result(
            model=self.model,
            history=history,
            config=self.config,
            lr=self.lr,
            source_accuracy_before=self.before.accuracy if self.before else None,
            chosen=chosen,
            plan=self.plan,
            run=self.folder.run if self.folder else None,
        )

    def _train(self, first: int, losses: list[Tensor], run_log: RunLog, bar: Any) -> None:
        try:
            if not run_log.history:
                run_log.add(self._record(0, []))
            stream = self.stream(first)
            self.model.train()
            # Without a folder there is nothing to save, and nothing to wait for.
            with Interruption() if self.folder else nullcontext() as interruption:
                for step in range(first, self.steps):
                    if self.stopping.stop:
                        break
                    losses.append(self.advance(step, next(stream)))
                    bar.update()
                    done = step + 1
                    if done % self.eval_every == 0 or done == self.steps:
                        if self.folder:
                            self.folder.check()
                        with self._averaged(done):
                            record = self._record(done, losses)
                            self.stopping.update(record, self.model)
                        losses = []
                        run_log.add(record)
                        bar.set_postfix(summary(record))
                    stop = interruption is not None and interruption.waiting
                    if stop or self._saves_at(done):
                        self._save(done, run_log, losses)
                    if interruption is not None:
                        interruption.deliver()
        finally:
            bar.close()
            run_log.close()

    def stream(self, first: int) -> Iterator[Batch]:
        """Batches from step `first` on, which depend on the seed and the step alone."""
        sources: Iterator[Any] = repeat(None)
        if self.replay:
            sources = self.replay.from_step(first)
        elif self.function_pull:
            sources = self.function_pull.stream(first)
        for batch, source in zip(self.batches.from_step(first), sources, strict=False):
            yield *batch, source

    def advance(self, step: int, batch: Batch) -> Tensor:
        """Step number `step` (0-based) and what belongs to it; returns what `_step` does."""
        loss = self._step(step, *batch)
        if self.function_pull:
            self.function_pull.after_step()
        if self.average:
            self.average.update(step + 1 - self.stall)
            if step + 1 == self.steps:
                self.average.adopt()
        self.protection.after_step(step + 1, self.model)
        return loss

    def _averaged(self, done: int) -> AbstractContextManager[None]:
        """The averaged weights in place, as the run will return them."""
        return self.average.applied() if self.average and done < self.steps else nullcontext()

    def _step(
        self,
        step: int,
        inputs: Any,
        labels: Tensor,
        index: Tensor | None,
        source: tuple[Any, Tensor] | None = None,
    ) -> Tensor:
        """One optimizer step.

        Returns:
            the batch's mean loss on the target and the penalties of the function pull, on the
            device; the loss of replayed inputs is not in it.

        Args:
            index: rows of the training data, or None.
            source: source inputs, and what to answer (replay) or their features at w0; or None.
        """
        pull = self.function_pull
        factor = lr_factor(self.config.schedule, step, self.steps, self.config.warmup)
        if pull:
            factor *= pull.restraint
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        labels = check_labels(labels, self.num_classes, "train").to(self.device)
        if length(inputs) != len(labels):
            raise ValueError(f"train: a batch has {length(inputs)} inputs, {len(labels)} labels")
        with self._autocast():
            inputs = self.augment(inputs, len(labels))
        if self.transform is not None or self.train_data.inputs is None:  # else seen beforehand
            check_finite_inputs(inputs, "train", index)
        denominator = self.loss.denominator(labels)
        places = pull.places(index, inputs) if pull else torch.empty(0)
        known = int((places >= 0).sum())
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        size = math.ceil(len(labels) / self.config.grad_accum_steps)
        parts = [slice(start, start + size) for start in range(0, len(labels), size)]
        sources = shares(source, len(parts)) if pull else [None] * len(parts)
        for part, source_part in zip(parts, sources, strict=True):
            with self._autocast():
                part_inputs = move(pick(inputs, part), self.device)
                if pull:
                    logits, penalty = pull.forward(
                        self.model, part_inputs, places[part], known, source_part
                    )
                    loss = self.loss.part(logits, labels[part], denominator) + penalty
                else:
                    logits = forward_logits(self.model, part_inputs)
                    loss = self.loss.part(logits, labels[part], denominator)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.replay and source is not None:
            self._replay(*source, size)
        self._began()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.head is not None and self.head.norm is not None:
            self.head.norm.update_deferred()
        return total

    def _replay(self, inputs: Any, answers: Tensor, size: int) -> None:
        """Add the gradient of the source loss, in micro-batches."""
        for start in range(0, len(answers), size):
            part = slice(start, start + size)
            with self._autocast():
                sources = move(pick(inputs, part), self.device)
                loss = replay_loss(self.model, sources, answers[part]) / len(answers)
            self.scaler.scale(loss).backward()

    def _autocast(self) -> torch.autocast:
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _record(self, step: int, losses: list[Tensor]) -> dict[str, Any]:
        """One line of the history: everything that is known after `step` steps."""
        loss = self._check_finite(step, losses)
        target = None
        if self.val is not None:
            with self._autocast():
                target = evaluate(self.model, self.val, self._eval_batch, self.device)
        source = self._source_score()
        grad_norm = float(self.optimizer.stats()["grad_norm"]) if step else None
        lost = self.before.accuracy - source.accuracy if source and self.before else None
        return {
            "step": step,
            "loss": loss,
            "target_accuracy": target.accuracy if target else None,
            "target_loss": target.loss if target else None,
            "source_accuracy": source.accuracy if source else None,
            "source_loss": source.loss if source else None,
            "forgetting": lost,
            "forecast": self.protection.forecast(),
            "drift": self.drift(),
            "grad_norm": grad_norm,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def _check_finite(self, step: int, losses: list[Tensor]) -> float | None:
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        folder = self.folder.path if self.folder else None
        return check_finite(step, losses, weights, self.lr, folder)

    def _source_score(self) -> Score | None:
        if self.source is None:
            return None
        with source_task(self.model), self._autocast():
            return evaluate(self.model, self.source, self._eval_batch, self.device)

    @property
    def _eval_batch(self) -> int:
        return max(128, self.batch_size)

    def _saves_at(self, done: int) -> bool:
        if self.folder is None:
            return False
        return done % (self.config.save_every or self.eval_every) == 0 or done == self.steps

    def _save(self, step: int, log: RunLog, losses: list[Tensor]) -> None:
        assert self.folder is not None
        self._check_finite(step, losses)  # it takes the place of a good one
        self.folder.check()
        record = {
            "history": log.state(),
            "losses": [float(x) for x in losses],
            "stopping": self.stopping.state(),
            "seconds": time.monotonic() - self.started,
            "scaler": self.scaler.state_dict(),
            "protection": self.protection.state(),
            "function_pull": self.function_pull.state() if self.function_pull else {},
        }
        facts, best = self._facts(self.folder.run), self.stopping.tensors()
        save_checkpoint(self.folder.path, step, self._state(), facts, record, best)

    def _resume(self) -> tuple[int, History | None, list[Tensor]]:
        """(steps done, history so far, losses since its last record)."""
        if self.folder is None or self.folder.source is None:
            return 0, None, []
        source = self.folder.source
        facts = self._facts(run_of(source))
        file, step, record, best = load_checkpoint(source, self._state(), facts, self.steps)
        with reading(file):
            self.stopping.load(record["stopping"], best)
            self.started -= float(record["seconds"])
            self.scaler.load_state_dict(record["scaler"])
            self.protection.load(record["protection"])
            if self.function_pull:
                self.function_pull.load(record["function_pull"])
            losses = [torch.tensor(float(x), device=self.device) for x in record["losses"]]
        return step, read_history(source, record["history"]), losses

    def _state(self) -> State:
        averages = self.average.state() if self.average else {}
        return State(self.model, self.optimizer, averages, self.generators)

    def _facts(self, run: str) -> Facts:
        """What a resumed run must share with the one it goes on from."""
        job = {
            "training samples": self.train_data.num_samples,
            "classes": self.num_classes,
            **self.identity,
        }
        return Facts(run, options_of(self.config), job, self.environment)


def _classes(train: Data, given: int | None) -> int:
    if given is not None:
        return check_num_classes(given)
    found = train.infer_num_classes()
    if found < 2:
        raise ValueError(
            "train: all labels are 0, one class; pass num_classes= where there are others"
        )
    return found
