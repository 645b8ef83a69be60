"""The loop of `fast.finetune` over a `fast.Adaptation`: evaluation, files, early stopping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.adaptation import Adaptation
from fast.adapt.config import AdaptConfig
from fast.adapt.loss import TargetLoss, class_weights
from fast.adapt.result import Record, Result
from fast.curvature.card import SourceCard
from fast.data.generators import seed_process
from fast.data.stream import spread_seed
from fast.data.transform import mixing
from fast.files import reading
from fast.models.signature import signature_of
from fast.ranks import ALONE, Ranks
from fast.train.config import TrainConfig
from fast.train.early_stopping import EarlyStopping
from fast.train.engine import Engine
from fast.train.finite import check_finite, warn_diverged
from fast.train.interrupt import Interruption
from fast.train.log.figures import figures, line, progress_bar
from fast.train.log.history import Callback, History, RunLog, read_history
from fast.train.log.lines import LogFile, log, steps_log
from fast.train.measure import Measure
from fast.train.resume.run_folder import RunFolder
from fast.train.resume.saver import Saver
from fast.train.run_data import RunData
from fast.train.step import TrainStep


class Trainer:
    """One run of `fast.finetune`, which `run` takes to its end.

    Args:
        model: pretrained, on the device it is trained on.
        card, source_inputs: see `fast.finetune`.
        folder: where the run saves, or None.
        ranks: the processes that train together.
        callbacks: see `fast.finetune`.
        began: called once everything has been checked, before the weights change.

    Attributes:
        losses: of the steps since the last evaluation.
    """

    adaptation: Adaptation
    train_step: TrainStep
    run_log: RunLog
    bar: Any  # see `progress_bar`

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        data: RunData,
        *,
        card: SourceCard | None = None,
        source_inputs: Any = None,
        folder: RunFolder | None = None,
        ranks: Ranks = ALONE,
        callbacks: Sequence[Callback] = (),
        began: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.model, self.data, self.folder = config, model, data, folder
        self.engine = Engine(next(model.parameters()).device, config.precision, ranks)
        self.card, self.source_inputs = card, source_inputs
        self.callbacks, self._began = callbacks, began
        self.measure = Measure(
            data.val, data.source, self.engine, config.batch_size, tta=config.tta
        )
        self.stopping = EarlyStopping(config.patience)
        self.losses: list[Tensor] = []
        self.saver: Saver | None = None

    def run(self) -> Result:
        """Train to the end."""
        with closing(LogFile()) as log_file:
            earlier = self._start()
            adaptation, plan = self.adaptation, self.adaptation.plan
            count = self.data.train.num_samples
            log.info("%s; %s classes, %s training samples", plan, self.data.num_classes, count)
            with closing(adaptation):
                if self.folder is not None:
                    self.folder.start()
                first = self.engine.ranks.first
                folder = self._path if first else None
                self.run_log = RunLog(folder, earlier, self.callbacks)
                log_file.write_to(folder)
                show = self.config.progress if first else False
                self.bar = progress_bar(show, adaptation.done, plan.steps, plan.method)
                with closing(self.run_log), closing(self.bar):
                    self._train()
        return self._result()

    def _adapt(self, resuming: bool) -> None:
        """Measure the source, then make the adaptation, which changes the network.

        Args:
            resuming: whether a checkpoint follows, which has the measurement.
        """
        config, data, engine = self.config, self.data, self.engine
        with engine.ranks.together():
            weights = class_weights(config.class_weights, data.train, data.num_classes)
        if weights is not None:
            weights = weights.to(engine.device)
        loss = TargetLoss(weights, config.label_smoothing)
        mix = mixing(config.mixup, config.cutmix, data.num_classes)
        if not resuming:
            if data.source is not None:
                steps_log.info("measuring the source")
            self.measure.measure_before(self.model)
        own = {f.name: getattr(config, f.name) for f in dataclasses.fields(AdaptConfig)}
        self.adaptation = Adaptation(
            self.model,
            data.train,
            num_classes=data.num_classes,
            source_inputs=self.source_inputs,
            card=self.card,
            loss=loss,
            augmented=data.transform is not None or mix is not None,
            autocast_dtype=engine.dtype,
            resuming=resuming,
            process_group=engine.ranks.group,
            **own,
        )
        engine.parallelize(self.model, self.adaptation.sample)
        if not engine.ranks.first:  # from here on each rank draws its own dropout and augmentation
            seed_process(spread_seed(config.seed, engine.ranks.rank))
        self.train_step = TrainStep(self.adaptation, data, loss, engine, mix, began=self._began)
        self.measure.start_clock()

    def _start(self) -> History | None:
        """Start a new run; or resume one from its checkpoint, and return the history so far."""
        if self.folder is None:
            self._adapt(resuming=False)
            return None
        with self.engine.ranks.together():
            self.saver = Saver(self.folder, self.config, self.model, self.data)
        self._adapt(resuming=self.folder.source is not None)
        self.saver.add_source(self.adaptation, self.card)
        if self.folder.source is None:
            return None
        file, record, best = self.saver.load(self.adaptation)
        with reading(file):
            self.stopping.load(record["stopping"], best)
            self.measure.load_state_dict(record["measure"])
            self.engine.load_state_dict(record["engine"])
            device = self.engine.device
            self.losses = [torch.tensor(float(x), device=device) for x in record["losses"]]
        return read_history(self.folder.source, record["history"])

    def _train(self) -> None:
        adaptation, steps = self.adaptation, self.adaptation.plan.steps
        eval_every = self.config.eval_every or max(1, steps // 10)
        save_every = self.config.save_every or eval_every
        steps_log.info("training")
        if not self.run_log.history:
            self._show(self.measure.record(adaptation, [], self._path))
        else:
            self.bar.set_postfix_str(figures(self.run_log.history[-1], self._source_before))
        self.model.train()
        # Without a folder there is nothing to save, so signals need not wait for the step's end.
        with Interruption() if self.folder else nullcontext() as interruption:
            for batch in self.train_step.batches():
                if self.stopping.stop:
                    break
                if adaptation.done == steps - 1 and self.config.budget is not None:
                    steps_log.info("checking the budget")
                self.losses.append(self.train_step(batch))
                self.bar.update()
                step = adaptation.done
                if step % eval_every == 0 or step == steps:
                    self._evaluate()
                    self.model.train()  # a callback may have asked it something
                stop = interruption is not None and interruption.waits_on_any(self.engine.ranks)
                if self.saver and (stop or step % save_every == 0 or step == steps):
                    # A good checkpoint is not replaced by a broken one.
                    check_finite(adaptation, self.losses, self._path)
                    self._save()
                if interruption is not None and stop:
                    interruption.deliver()

    def _evaluate(self) -> None:
        """Measure the averaged weights, and report what came out."""
        if self.folder:
            self.folder.check()
        with self.adaptation.averaged():
            record = self.measure.record(self.adaptation, self.losses, self._path)
            self.stopping.update(record, self.model)
        self.measure.keep_by_class({0, self.stopping.best_step, record["step"]})
        self._show(record)
        self.losses = []

    def _show(self, record: Record) -> None:
        """Report what was measured: to files and callbacks, in a line, and beside the bar."""
        self.run_log.add(record)
        before, steps = self._source_before, self.adaptation.plan.steps
        steps_log.info("%s", line(record, steps, self._epochs(record["step"]), before))
        self.bar.set_postfix_str(figures(record, before))

    def _epochs(self, step: int) -> float:
        """How many times the training data were used up to a step."""
        train = self.data.train
        if train.loader is not None:
            return step / len(train.loader)
        return step * self.adaptation.plan.target_size / (train.num_samples or 1)

    @property
    def _path(self) -> Path | None:
        """Where the run saves, or None."""
        return self.folder.path if self.folder else None

    @property
    def _source_before(self) -> float | None:
        return self.measure.before.accuracy if self.measure.before else None

    def _save(self) -> None:
        assert self.saver is not None
        record = {
            "history": self.run_log.state(),
            "losses": [float(x) for x in self.losses],
            "stopping": self.stopping.state(),
            "measure": self.measure.state_dict(),
            "engine": self.engine.state_dict(),
        }
        self.saver.save(self.adaptation, record, self.stopping.tensors())

    def _result(self) -> Result:
        history = self.run_log.history
        warn_diverged(history[-1]["loss"], self.data.num_classes)
        self.stopping.restore(self.model)
        final = self.stopping.best
        first, last = history[0], final or history[-1]
        before, after = first["target_accuracy"], last["target_accuracy"]
        start = self.adaptation.head_start
        if start and before is not None and after is not None and after < before:
            start.restore()
            final = last = first
        self.adaptation.optimizer.zero_grad()
        self.adaptation.gather()
        self.model.eval()
        return Result(
            model=self.model,
            history=history,
            config=self.config,
            source_accuracy_before=self._source_before,
            chosen=final,
            plan=self.adaptation.plan,
            run=self.folder.run if self.folder else None,
            inputs=signature_of(self.adaptation.sample),
            by_class=self.measure.by_class.get(last["step"]),
        )
