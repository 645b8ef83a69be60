"""The part of the method that a callback can do, for those who keep their own Trainer class."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fast.adapt.adaptation import Adaptation
from fast.adapt.result import Result
from fast.heads import evaluating, source_task
from fast.integrations.transformers.files import load_state, save_state


class FastCallback(TrainerCallback):
    """Evaluates the averaged weights, saves and resumes an adaptation, and finishes it.

        adaptation = fast.Adaptation(model, train, steps=args.max_steps, ...)
        trainer = MyTrainer(model, args, callbacks=[FastCallback(adaptation)],
                            optimizers=(adaptation.optimizer, adaptation.scheduler()), ...)

    The state goes into the Trainer's checkpoint folders. A callback cannot change the loss:
    distillation and rehearsal need the lines of `compute_loss` in docs/transformers.md. There must
    be one evaluation data set, and `save_model` writes the unfolded model: call `fast.fold_head`
    first. With `load_best_model_at_end` the model ends in the averaged weights of the best step.

    Args:
        adaptation: the adaptation of the model that the Trainer trains.
        source_eval: a function of the model that returns an accuracy, or None. The accuracy appears
            as `eval_source_accuracy` in the metrics and in the last record of the log.
    """

    def __init__(
        self, adaptation: Adaptation, source_eval: Callable[[nn.Module], float] | None = None
    ) -> None:
        self.adaptation, self.source_eval = adaptation, source_eval
        self.result: Result | None = None
        self._averaged: AbstractContextManager[None] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        if inner is not self.adaptation.optimizer:
            raise ValueError(
                f"the Trainer's optimizer is its own {type(inner).__name__}: pass "
                "optimizers=(adaptation.optimizer, adaptation.scheduler()) to it"
            )
        plan = self.adaptation.plan
        way_out = f"TrainingArguments(max_steps={plan.steps})"
        plan.check_length(state.max_steps, owner="the adaptation", way_out=way_out)
        if state.global_step > self.adaptation.done:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not folder.exists():
                raise ValueError(
                    f"the Trainer resumes from step {state.global_step}, and FastCallback looks "
                    f"for its state in {folder}, which does not exist: set output_dir of "
                    "TrainingArguments to the folder that the checkpoint lies in"
                )
            self.adaptation.load_state_dict(load_state(folder)["adaptation"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate and self._averaged is None:
            self._averaged = self.adaptation.averaged()
            self._averaged.__enter__()

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if self.source_eval is not None and metrics is not None:
            with source_task(self.adaptation.model), evaluating(self.adaptation.model):
                metrics["eval_source_accuracy"] = float(self.source_eval(self.adaptation.model))
            state.log_history[-1]["eval_source_accuracy"] = metrics["eval_source_accuracy"]
        if self._averaged is not None:
            self._averaged.__exit__(None, None, None)
            self._averaged = None
            if metrics is not None and "eval_runtime" not in metrics:  # but eval_NAME_runtime
                raise ValueError(
                    "eval_dataset of the Trainer has several data sets, and FastCallback would let "
                    "only the first see the averaged weights: give one, or use FastTrainer"
                )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.adaptation)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has loaded the weights of that step, and evaluated their average.
            best = load_state(state.best_model_checkpoint)
            self.adaptation.model.load_state_dict(best["model"])
            self.adaptation.load_state_dict(best["adaptation"])
        self.result = self.adaptation.finish()
