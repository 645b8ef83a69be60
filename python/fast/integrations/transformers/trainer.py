"""The whole method inside Hugging Face's Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from fast.adapt.adaptation import Adaptation
from fast.adapt.config import AdaptOptions
from fast.adapt.loss import TargetLoss
from fast.adapt.network.rollback import RollbackOnError
from fast.adapt.result import Result
from fast.curvature.card import SourceCard
from fast.data.dataset import split_batch
from fast.data.labels import check_labels
from fast.data.recorded import is_table
from fast.data.source_inputs import LIMIT, drawn_rows
from fast.data.trees import LABEL_KEYS, move
from fast.heads import evaluating, fold_head, forward_logits, source_task, task_head
from fast.heads.replace import name_classes, own_config
from fast.integrations.transformers.arguments import (
    adaptation_options,
    autocast_dtype,
    check_arguments,
    check_options,
    plan_schedules,
)
from fast.integrations.transformers.files import (
    append_to_card,
    card_section,
    load_state,
    save_state,
    write_card,
)


class FastTrainer(Trainer):
    """Hugging Face's Trainer with the method of `fast.Adaptation` inside.

        trainer = FastTrainer(model, args, train_dataset=train, eval_dataset=val,
                              source_inputs=kept, source_eval=old, forget_budget="2%")
        trainer.train()
        trainer.save_model("adapted/")      # loads with from_pretrained, without this library

    The constructor gives the model its new head, calibrates it and teaches it; if it fails, the
    model is left as it was. `args` rules the run: steps, batches, accumulation, clipping,
    precision, seed, evaluation and checkpoints. If the learning rate or the scheduler is left at
    the default of `TrainingArguments` (5e-5, linear), the plan's is used.
    `per_device_train_batch_size` counts target samples; a seventh as many source inputs come on
    top. Under `torchrun` the processes train together, each on a batch of that size.

    The averaged weights are evaluated. Checkpoint folders hold a plain model, as `save_model`
    writes it, and what `train(resume_from_checkpoint=...)` needs to go on.

    Args:
        model: pretrained, with its own head.
        args: see `transformers.Trainer`, also for arguments that are not listed here.
        train_dataset: labels are class indices under `labels`, unless `compute_loss_func` says
            otherwise.
        num_classes: C, the target's classes (default: from the labels of `train_dataset`).
        id2label: names of the classes (default: those that `train_dataset` records; without any
            they are `LABEL_0`, `LABEL_1`, ...).
        source_inputs: see `fast.Adaptation`; data sets go through the Trainer's collator.
        source_eval: held-out source data with labels; or a function of the model that returns an
            accuracy. It gives `eval_source_accuracy`.
        card: see `fast.Adaptation`.
        **options: the options of `fast.Adaptation` that `args` does not have.

    Attributes:
        adaptation: the method; `adaptation.plan` has the resolved settings.
        result: after `train`, what `Adaptation.finish` returned.
        source_accuracy_before: source accuracy of the pretrained model.
        source_accuracy: source accuracy as last measured.

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
        check_options(options)
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
        # The Trainer drops the labels of a network whose `forward` takes none.
        self._takes_labels = bool(self.label_names)
        self.label_names = self.label_names or ["labels"]
        check_arguments(self.args, model, options)
        loader = self.get_train_dataloader()
        samples = loader.dataset
        if isinstance(samples, IterableDataset):
            raise ValueError("train_dataset is iterable only; give one with samples by number")
        self._plan_schedules = plan_schedules(self.args, options)
        self.mean_loss = TargetLoss(None, self.args.label_smoothing_factor)
        self.source_eval = source_eval
        self.source_accuracy_before = self.source_accuracy = self.measure_source()
        settings = adaptation_options(self.args, len(loader), options)
        with RollbackOnError(model), ExitStack() as on_error:
            self.adaptation = Adaptation(
                model,
                DataLoader(samples, settings["batch_size"], True, collate_fn=loader.collate_fn),
                num_classes=num_classes,
                source_inputs=self._collated(source_inputs),
                card=card,
                loss=self._own_loss if compute_loss_func else self.mean_loss,
                optimizer=self._optimizer_choice(),
                autocast_dtype=autocast_dtype(self.args),
                **settings,
            )
            on_error.callback(self.adaptation.close)
            _check_folds(model)
            self.id2label = _names_of(samples, id2label, self.adaptation.num_classes)
            self._describe_task(model)
            on_error.pop_all()
        for group in self.adaptation.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
                group["eps"] = self.args.adam_epsilon
        self.result: Result | None = None

    def _describe_task(self, model: nn.Module) -> None:
        """Tell the model's config of the target, for its own loss and for pipelines."""
        if getattr(model, "config", None) is None:
            return
        own_config(model, model.config)  # with a head that is kept, it is still the user's
        config: Any = model.config
        name_classes(config, [str(name) for _, name in sorted(self.id2label.items())])
        if self.compute_loss_func is None and getattr(config, "problem_type", None) is not None:
            config.problem_type = "single_label_classification"  # the source's may be another

    # Data.

    def _collated(self, data: Any) -> Any:
        """A data set as one batch, made by the Trainer's collator; anything else as it is."""
        if not (isinstance(data, (Dataset, list)) or is_table(data)):
            return data
        loader = self.get_eval_dataloader(data)
        samples: Any = loader.dataset
        rows = drawn_rows(len(samples), LIMIT).tolist()
        return dict(loader.collate_fn([samples[i] for i in rows]))

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
                correct = logits.argmax(1) == labels.to(logits.device)
                correct = self.accelerator.gather_for_metrics(correct)  # of all processes
                right += int(correct.sum())
                count += len(correct)
        return right / count

    # The step.

    def _optimizer_choice(self) -> Any:
        """The fused optimizer for `optim="adamw_torch"` and `"sgd"`; any other gets the pull beside
        its step."""
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
            if self._takes_labels:
                if self.args.world_size > 1 and self.compute_loss_func is None:
                    # The Trainer multiplies by the number of processes also where the network's
                    # loss is a mean, which ignores this number.
                    num_items_in_batch = None
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            inputs, labels = split_batch(inputs, "eval_dataset")
            logits = forward_logits(model, inputs)
            loss = (self._own_loss if self.compute_loss_func else self.mean_loss)(logits, labels)
            return (loss, {"logits": logits}) if return_outputs else loss
        parts = self.current_gradient_accumulation_steps
        inputs, labels = split_batch(inputs, "train_dataset")
        with self.accelerator.autocast():
            logits, penalty = self.adaptation.forward(inputs, model=model)
            number = len(labels) * parts if num_items_in_batch is None else num_items_in_batch
            if self.compute_loss_func is not None:
                loss = self._own_loss(logits, labels, number)
            else:
                loss = self.mean_loss.part(logits, labels, number)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # the number counts the items of all processes
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

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # A finished run was resumed within an epoch: the Trainer would take one step more.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **options)

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
        """A copy with the averaged weights and a plain head; nothing of this library is in it."""
        with self.adaptation.averaged():
            return fold_head(copy.deepcopy(self.adaptation.model))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        model, self.model = self.model, cast(Any, self.plain_model())
        try:
            super()._save(output_dir)
        finally:
            self.model = model
        write_card(output_dir or cast(str, self.args.output_dir), self.card_section())

    def card_section(self) -> str:
        """What the model card says of the adaptation, in Markdown."""
        return card_section(self.adaptation, self.source_accuracy_before, self.source_accuracy)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        super().create_model_card(*args, **options)
        if self.is_world_process_zero():
            append_to_card(cast(str, self.args.output_dir), self.card_section())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(output_dir, self.adaptation)

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


def _check_folds(model: nn.Module) -> None:
    head = task_head(model)
    if head is not None and head.source.bias is None and head.linear.bias is not None:
        raise ValueError(
            "the head of the model has no bias, and the mean of the features becomes one, which "
            "from_pretrained would lose: give the head a bias, or set max_entropy=False"
        )


def _names_of(samples: Any, id2label: Mapping[int, str] | None, num_classes: int) -> dict[int, str]:
    """Names of the classes: the user's, or those that the data set records, or none.

    Raises:
        ValueError: the user's names do not cover each class.
    """
    if id2label is not None:
        if set(id2label) != set(range(num_classes)):
            raise ValueError(
                f"id2label must name the classes 0 to {num_classes - 1}; got {list(id2label)}"
            )
        return dict(id2label)
    names = getattr(samples, "classes", None)
    if is_table(samples):
        features = [samples.features[key] for key in LABEL_KEYS if key in samples.features]
        names = getattr(features[0], "names", None) if features else None
    return dict(enumerate(names)) if names and len(names) == num_classes else {}
