"""The whole method inside Hugging Face's Trainer: `FastTrainer`, and `FastCallback` for a part."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from fast.adapt.adaptation import Adaptation
from fast.adapt.config import AdaptOptions
from fast.adapt.loss import Loss
from fast.adapt.network.rollback import RollbackOnError
from fast.adapt.result import Result
from fast.curvature.card import SourceCard
from fast.data.dataset import split_batch
from fast.data.labels import check_labels
from fast.data.recorded import is_table
from fast.data.source_inputs import LIMIT
from fast.data.trees import LABEL_KEYS, move
from fast.heads import evaluating, fold_head, forward_logits, source_task, task_head

STATE_FILE = "adaptation.pt"
PAPER = "[FAST](https://arxiv.org/abs/2007.01388) (arXiv:2007.01388)"
CARD_FRONT = "---\nlibrary_name: transformers\ntags:\n- fast\n---\n"
CARD_HEADING = "## What the model still knows"
# Options of `fast.Adaptation` that `TrainingArguments` has under a name of its own.
ELSEWHERE = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "warmup": "warmup_steps",
    "weight_decay": "weight_decay",
}
DEFAULTS = {f.name: f.default for f in fields(TrainingArguments)}
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FastTrainer(Trainer):
    """Hugging Face's Trainer with the method of `fast.Adaptation` inside.

        trainer = FastTrainer(model, args, train_dataset=train, eval_dataset=val,
                              source_inputs=kept, source_eval=old, forget_budget="2%")
        trainer.train()
        trainer.save_model("adapted/")      # loads with from_pretrained, without this library

    The constructor gives the model its new head, calibrates it and teaches it; when it fails, the
    model is as it was. `args` rules the run: steps, batches, accumulation, clipping, precision,
    seed, evaluation and checkpoints. Where the learning rate and the scheduler are at the defaults
    of `TrainingArguments` (5e-5, linear), those of the plan hold. `per_device_train_batch_size`
    counts target samples; a seventh as many source inputs come on top.

    Evaluation is of the averaged weights. Checkpoint folders hold a plain model, as `save_model`
    writes it, and what `train(resume_from_checkpoint=...)` goes on from.

    Args:
        model: pretrained, with its own head.
        args, train_dataset, ...: see `transformers.Trainer`; labels are class indices under
            `labels`, unless `compute_loss_func` says otherwise.
        num_classes: C, of the target (default: from the labels of `train_dataset`).
        id2label: names of the classes (default: those that `train_dataset` records).
        source_inputs: see `fast.Adaptation`; data sets go through the Trainer's collator.
        source_eval: held-out source data with labels; or a function of the model that returns an
            accuracy. It gives `eval_source_accuracy`.
        card: see `fast.Adaptation`.
        **options: the options of `fast.Adaptation` that `args` does not have.

    Attributes:
        adaptation: the method; `adaptation.plan` has the resolved settings.
        result: after `train`, what `Adaptation.finish` returned.
        source_accuracy_before, source_accuracy: of the pretrained model, and as last measured.

    Raises:
        ValueError, TypeError: an option, the data or the model does not fit; the message names it.
    """

    # `compute_loss` divides by the samples of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        num_classes: int | None = None,
        id2label: Mapping[int, str] | None = None,
        source_inputs: Any = None,
        source_eval: Any = None,
        card: SourceCard | str | Path | None = None,
        **options: Unpack[AdaptOptions],
    ) -> None:
        for name in sorted(ELSEWHERE.keys() & options.keys()):
            raise ValueError(f"{name}: set {ELSEWHERE[name]} of TrainingArguments")
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        _check(self.args, model)
        loader = self.get_train_dataloader()
        if not hasattr(loader.dataset, "__getitem__"):
            raise ValueError(
                "train_dataset is iterable only; give one with len() and samples by number"
            )
        steps = _num_steps(self.args, len(loader))
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        train = DataLoader(
            loader.dataset, batch_size=batch_size, shuffle=True, collate_fn=loader.collate_fn
        )
        own_schedule = self.args.lr_scheduler_type != DEFAULTS["lr_scheduler_type"]
        self._plan_schedules = "schedule" in options or not own_schedule
        if own_schedule and self.args.lr_scheduler_type.startswith("constant"):
            options.setdefault("schedule", "constant")
        if self.args.learning_rate != DEFAULTS["learning_rate"]:
            options.setdefault("lr", self.args.learning_rate)
        self.source_eval = source_eval
        self.source_accuracy_before = self.source_accuracy = self.measure_source()
        self.mean_loss = Loss(None, self.args.label_smoothing_factor)
        options |= {
            "steps": steps,
            "batch_size": batch_size,
            "grad_accum_steps": self.args.gradient_accumulation_steps,
            "seed": self.args.seed,
            "warmup": self.args.get_warmup_steps(steps),
            "weight_decay": self.args.weight_decay,
        }
        with RollbackOnError(model):
            self.adaptation = Adaptation(
                model,
                train,
                num_classes=num_classes,
                source_inputs=self._collated(source_inputs),
                card=card,
                loss=self._own_loss if compute_loss_func else self.mean_loss,
                optimizer=self._optimizer_choice(),
                autocast_dtype=next(
                    (t for n, t in PRECISION.items() if getattr(self.args, n)), None
                ),
                **options,
            )
            for group in self.adaptation.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
                    group["eps"] = self.args.adam_epsilon
            _check_folds(model)
            names = _recorded_names(loader.dataset) if id2label is None else dict(id2label)
            classes = self.adaptation.num_classes
            if id2label is not None and set(names) != set(range(classes)):
                raise ValueError(
                    f"id2label must name the classes 0 to {classes - 1}; got {list(names)}"
                )
        self.id2label = names if len(names) == classes else {}
        self.result: Result | None = None

    # Data.

    def _collated(self, data: Any) -> Any:
        """A data set as one batch that the Trainer's collator made; anything else as it is."""
        if not (isinstance(data, (Dataset, list)) or is_table(data)):
            return data
        loader = self.get_eval_dataloader(data)
        samples: Any = loader.dataset
        return dict(loader.collate_fn([samples[i] for i in range(min(LIMIT, len(samples)))]))

    def measure_source(self) -> float | None:
        """Accuracy of the source head on `source_eval`, in 0..1; None without it."""
        model, data = cast(nn.Module, self.model), self.source_eval
        if data is None:
            return None
        with source_task(model), evaluating(model), self.accelerator.autocast():
            if callable(data):
                return float(data(model))
            right = count = 0
            for batch in self.get_eval_dataloader(data):
                inputs, labels = split_batch(batch, "source_eval")
                logits = forward_logits(model, move(inputs, self.args.device))
                labels = check_labels(labels, logits.shape[1], "source_eval")
                right += int((logits.argmax(1).cpu() == labels.cpu()).sum())
                count += len(labels)
        return right / count

    # The step.

    def _optimizer_choice(self) -> Any:
        """Ours for `optim="adamw_torch"` and `"sgd"`; any other gets the pull beside its step."""
        name = str(getattr(self.args.optim, "value", self.args.optim))
        if name.startswith("adamw_torch") or name == "sgd":
            return name.split("_")[0]
        make, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
        return lambda groups: make(groups, **options)

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = self.adaptation.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and self._plan_schedules:
            self.lr_scheduler, self._created_lr_scheduler = self.adaptation.scheduler(), True
        return super().create_scheduler(num_training_steps, optimizer)

    def _own_loss(self, logits: Tensor, labels: Tensor, number: Any = None) -> Tensor:
        assert self.compute_loss_func is not None
        number = len(labels) if number is None else number
        outputs = SequenceClassifierOutput(logits=cast(Any, logits))
        return self.compute_loss_func(outputs, labels, num_items_in_batch=number)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        parts = self.current_gradient_accumulation_steps
        inputs, labels = split_batch(inputs, "train_dataset")
        with self.accelerator.autocast():
            logits, penalty = self.adaptation.forward(inputs, model=model)
            number = len(labels) * parts if num_items_in_batch is None else num_items_in_batch
            if self.compute_loss_func is not None:
                loss = self._own_loss(logits, labels, number)
            else:
                loss = self.mean_loss.part(logits, labels, number)
        loss = loss + penalty / parts
        return (loss, {"logits": logits}) if return_outputs else loss

    # The run.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, then take the averaged weights and keep the budget: see `transformers.Trainer`.

        Raises:
            RuntimeError: this trainer has trained already.
        """
        if self.result is not None:
            raise RuntimeError(
                "this FastTrainer has trained already, and its method is over: save_model() and "
                "make a new one of the saved model"
            )
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.result = self.adaptation.finish()
        self.source_accuracy = self.measure_source()
        return output

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        with self.adaptation.averaged():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if description == "Evaluation" and self.source_eval is not None:
                self.source_accuracy = accuracy = self.measure_source()
                cast(dict[str, Any], output.metrics)[f"{metric_key_prefix}_source_accuracy"] = (
                    accuracy
                )
        return output

    # Files.

    def plain_model(self) -> nn.Module:
        """A copy with the averaged weights and a plain head: nothing of this library is in it."""
        with self.adaptation.averaged():
            model = fold_head(copy.deepcopy(self.adaptation.model))
        config = getattr(model, "config", None)
        if config is not None and self.id2label:
            config.id2label = {i: str(name) for i, name in self.id2label.items()}
            config.label2id = {name: i for i, name in config.id2label.items()}
        return model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model, self.model = self.model, cast(Any, self.plain_model())
        try:
            super()._save(output_dir)
        finally:
            self.model = model
        readme = Path(output_dir or cast(str, self.args.output_dir)) / "README.md"
        if not readme.exists() or CARD_HEADING in readme.read_text(encoding="utf-8"):
            readme.write_text(f"{CARD_FRONT}\n{self.card_text()}", encoding="utf-8")

    def card_text(self) -> str:
        """What a model card should say of the adaptation, in Markdown."""
        plan = self.adaptation.plan
        lines = [CARD_HEADING, "", f"Fine-tuned with {PAPER}: {plan}."]
        if plan.forget_budget is not None:
            lines.append(f"The source task was allowed to lose {self.adaptation.config.budget}.")
        before, after = self.source_accuracy_before, self.source_accuracy
        if before is None or after is None:
            lines.append("The accuracy on the source task was not measured.")
        else:
            lines += [
                "",
                "| accuracy on the source task | |",
                "| --- | --- |",
                f"| before | {100 * before:.1f} % |",
                f"| after | {100 * after:.1f} % |",
            ]
        return "\n".join(lines) + "\n"

    def create_model_card(self, *args: Any, **options: Any) -> None:
        super().create_model_card(*args, **options)
        if self.is_world_process_zero():
            readme = Path(cast(str, self.args.output_dir)) / "README.md"
            text = readme.read_text(encoding="utf-8")
            readme.write_text(f"{text}\n{self.card_text()}", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "model": self.adaptation.model.state_dict(),
            "adaptation": self.adaptation.state_dict(),
        }
        torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.adaptation.model.load_state_dict(load_state(resume_from_checkpoint)["model"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.adaptation.load_state_dict(load_state(checkpoint)["adaptation"])

    def _load_best_model(self) -> None:
        folder = cast(str, self.state.best_model_checkpoint)
        self._load_from_checkpoint(folder)
        self.adaptation.load_state_dict(load_state(folder)["adaptation"])


def load_state(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint folder holds of the adaptation.

    Raises:
        ValueError: it holds nothing.
    """
    file = Path(folder) / STATE_FILE
    if not file.exists():
        raise ValueError(
            f"{folder} has no {STATE_FILE}: another Trainer wrote it, or save_only_model was set. "
            "Start anew from the pretrained model"
        )
    return torch.load(file, map_location="cpu", weights_only=True)


class FastCallback(TrainerCallback):
    """What a callback can do of the method, for those who keep their own Trainer class.

        adaptation = fast.Adaptation(model, train, steps=args.max_steps, ...)
        trainer = MyTrainer(model, args, callbacks=[FastCallback(adaptation)],
                            optimizers=(adaptation.optimizer, adaptation.scheduler()), ...)

    It evaluates the averaged weights, saves the adaptation in the Trainer's checkpoint folders and
    goes on from there, and finishes it. A callback has no hand in the loss: distillation and
    rehearsal need the three lines of `compute_loss` in docs/transformers.md. Evaluation is of one
    data set, and `save_model` writes the unfolded model: call `fast.fold_head` before.

    Args:
        adaptation: of the model that the Trainer trains.
        source_eval: a function of the model that returns an accuracy, or None; its figure is
            `eval_source_accuracy` in the metrics and in the last record of the log.
    """

    def __init__(
        self, adaptation: Adaptation, source_eval: Callable[[nn.Module], float] | None = None
    ) -> None:
        self.adaptation, self.source_eval = adaptation, source_eval
        self.result: Result | None = None
        self._averaged: AbstractContextManager[None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > self.adaptation.done:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
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

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save({"adaptation": self.adaptation.state_dict()}, folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.result = self.adaptation.finish()


def _check(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ValueError for what the method cannot do inside the Trainer."""
    refused = {
        "auto_find_batch_size": "the plan counts steps of one size; leave it out",
        "bf16_full_eval": "it casts the weights; bf16=True evaluates under autocast",
        "fp16_full_eval": "it casts the weights; fp16=True evaluates under autocast",
        "deepspeed": "it trains copies of the weights; leave it out",
        "fsdp": "it shards the weights; leave it out",
    }
    for name, reason in refused.items():
        if getattr(args, name, None):
            raise ValueError(f"{name} of TrainingArguments: {reason}")
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"FastTrainer trains on one device, and there are {max(args.world_size, args.n_gpu)}: "
            "set CUDA_VISIBLE_DEVICES, or use fast.finetune or fast.Adaptation in a loop of yours"
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ValueError(f"load_best_model_at_end reads {STATE_FILE}: leave save_only_model out")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "model is a PEFT model, whose head and adapters are saved apart: use fast.Adaptation "
            "in a loop of yours, or merge_and_unload()"
        )


def _check_folds(model: nn.Module) -> None:
    head = task_head(model)
    if head is not None and head.source.bias is None and head.linear.bias is not None:
        raise ValueError(
            "the head of the model has no bias, and the mean of the features becomes one, which "
            "from_pretrained would lose: give the head a bias, or set max_entropy=False"
        )


def _num_steps(args: TrainingArguments, batches: int) -> int:
    """Optimizer steps of the run, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * per_epoch)


def _recorded_names(dataset: Any) -> dict[int, str]:
    """Names of the classes, where a data set records them."""
    names = getattr(dataset, "classes", None)
    if is_table(dataset):
        features = [dataset.features[key] for key in LABEL_KEYS if key in dataset.features]
        names = getattr(features[0], "names", None) if features else None
    return dict(enumerate(names or ()))
