"""The method inside Lightning's Trainer: a callback, and one line in `training_step`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from fast.adapt.adaptation import Adaptation
from fast.adapt.config import AdaptConfig, AdaptOptions, OptimizerName
from fast.adapt.optimizer import MakeOptimizer
from fast.adapt.result import Result
from fast.curvature.card import SourceCard
from fast.data.dataset import as_data
from fast.data.trees import pick
from fast.errors import first_line
from fast.heads import source_task, unwrap
from fast.heads.forward import LEAST_EVAL_BATCH
from fast.train.measure import evaluate

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = ("32-true", *AUTOCAST)
# Callbacks that do not go with this one, and why.
OTHER_CALLBACKS = {
    "StochasticWeightAveraging": "would put its weights in place of those that FastCallback "
    "averages, and that a budget was checked for: leave it out (FastCallback(average=N) averages "
    "over N steps)",
    "LearningRateFinder": "trains the network, and puts back its weights alone: leave it out "
    "(FastCallback(lr=...) sets a rate, and without it the plan has one)",
    "BatchSizeFinder": "trains the network, and puts back its weights alone: leave it out",
}
OTHER_CALLBACKS["WeightAveraging"] = OTHER_CALLBACKS["StochasticWeightAveraging"]


class CallbackOptions(AdaptOptions, total=False):
    """Arguments of `fast.Adaptation` that FastCallback passes on."""

    num_classes: int
    source_inputs: Any
    card: SourceCard | str | Path
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: OptimizerName | MakeOptimizer
    augmented: bool
    autocast_dtype: torch.dtype
    process_group: Any


class FastCallback(Callback):
    """Adapts a network in a LightningModule, and holds what it knew.

        class Classifier(lightning.LightningModule):
            def __init__(self, network, fast):
                super().__init__()
                self.network, self.fast = network, fast

            def configure_optimizers(self):
                return self.fast.optimizers()

            def training_step(self, batch, index):
                inputs, labels = batch
                logits, penalty = self.fast.forward(inputs)
                return F.cross_entropy(logits, labels) + penalty

        fast_callback = FastCallback(network, (x, y), source_inputs=kept)
        trainer = lightning.Trainer(max_epochs=3, callbacks=[fast_callback])
        trainer.fit(Classifier(network, fast_callback), loader)
        fast_callback.result.save("adapted/")

    `trainer.fit` makes a `fast.Adaptation` before optimizers are configured, on the Trainer's
    device, and puts a network that is in evaluation mode into training mode. Validation, test and
    prediction see the averaged weights. Checkpoints hold the state of the adaptation and of the
    random generators, so a resumed run ends in the same weights, bit for bit, if its loader gives
    the same batches again; `loader` does.

    Args:
        network: pretrained; the LightningModule or a part of it.
        train: training data: see `fast.Adaptation`.
        source: labelled data of the source task, or a function of the network that returns an
            accuracy in 0..1: `source_accuracy` is logged in every validation.
        **options: options of `fast.Adaptation`. `steps` defaults to the Trainer's number of steps,
            which it does not know where a module optimizes manually; `grad_accum_steps` defaults to
            its `accumulate_grad_batches`.

    Attributes:
        result: after `fit`, what `Adaptation.finish` returned; until then None. Where a checkpoint
            is tested afterwards (`trainer.test(ckpt_path="best")`), what it returned for that one.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Any,
        *,
        source: Any = None,
        **options: Unpack[CallbackOptions],
    ) -> None:
        if options.get("shard"):
            raise ValueError(
                "shard: Lightning's strategies wrap the network themselves; use fast.finetune or "
                "fast.Adaptation in a loop of yours"
            )
        self.network, self.options = unwrap(network), options
        self._train = train
        self.source = source if source is None or callable(source) else as_data(source, "source")
        self.result: Result | None = None
        self._adaptation: Adaptation | None = None
        self._before: float | None = None
        self._other_state = False  # a checkpoint was loaded after the end of the run
        self._generators: dict[str, Any] | None = None
        self._averaged = ExitStack()

    def __deepcopy__(self, memo: dict[int, Any]) -> FastCallback:
        return self  # in a copy of a module that holds it, say to be saved

    @property
    def adaptation(self) -> Adaptation:
        """The adaptation of this run.

        Raises:
            RuntimeError: `trainer.fit` has not begun.
        """
        if self._adaptation is None:
            raise RuntimeError(
                "FastCallback has no adaptation yet: pass it to Trainer(callbacks=[...]), whose "
                "fit() makes one"
            )
        return self._adaptation

    # What the LightningModule calls.

    @property
    def optimizer(self) -> Optimizer:
        return self.adaptation.optimizer

    def optimizers(self) -> dict[str, Any]:
        """The optimizer and the plan's schedule, as `configure_optimizers` returns them."""
        scheduler = {"scheduler": self.adaptation.scheduler(), "interval": "step"}
        return {"optimizer": self.adaptation.optimizer, "lr_scheduler": scheduler}

    def forward(self, inputs: Any, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Target logits `[B, C]`, and the penalty `[]`: see `fast.Adaptation.forward`."""
        return self.adaptation.forward(inputs, rows)

    @property
    def loader(self) -> PlannedBatches:
        """Batches `(inputs, labels, rows)` of `train` in the order of `fast.finetune`, for
        `trainer.fit(module, callback.loader)`; a resumed run continues them."""
        return PlannedBatches(self)

    # What the Trainer calls.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._adaptation is not None:
            raise ValueError(
                "this FastCallback has adapted its network already: make a new one, of a "
                "pretrained network, for another fit()"
            )
        if all(m is not self.network for m in pl_module.modules()):
            raise ValueError(
                f"the network of FastCallback, a {type(self.network).__name__}, is no part of "
                f"{type(pl_module).__name__}: give both the same object"
            )
        _check_trainer(trainer)
        options: dict[str, Any] = dict(self.options)
        if not {"steps", "epochs"} & set(options):
            if not pl_module.automatic_optimization:
                raise ValueError(
                    f"{type(pl_module).__name__} optimizes manually, so that the Trainer does not "
                    "know how many steps it takes: FastCallback(steps=...), the calls of step() of "
                    "FastCallback's optimizer in the whole run"
                )
            options["steps"] = _steps(trainer)
        options |= _accumulation(trainer, options)
        options.setdefault("autocast_dtype", AUTOCAST.get(str(trainer.precision)))
        self.network.to(trainer.strategy.root_device)
        self._before = self._source_accuracy()
        self._adaptation = Adaptation(
            self.network, self._train, resuming=trainer.ckpt_path is not None, **options
        )
        if not self.network.training:  # as from_pretrained leaves it; Lightning would, too
            self.network.train()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if all(optimizer is not self.optimizer for optimizer in trainer.optimizers):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise ValueError(
                f"configure_optimizers of {type(pl_module).__name__} gives {names or 'nothing'}, "
                "which is not FastCallback's optimizer: return fast_callback.optimizers(), and "
                "pass FastCallback(optimizer=lambda groups: ...) to use one of yours"
            )
        unscales = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if trainer.gradient_clip_val and unscales and "mixed" in str(trainer.precision):
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val:g}): Lightning cannot clip "
                "for a fused optimizer in mixed precision; leave it out, and pass "
                f"max_grad_norm={trainer.gradient_clip_val:g} to FastCallback"
            )
        if not pl_module.automatic_optimization:  # the Trainer counts steps of all optimizers
            return
        plan = self.adaptation.plan
        way_out = f"Trainer(max_steps={plan.steps})"
        plan.check_length(_steps(trainer), owner="FastCallback", way_out=way_out)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Restored here, because loaders and sanity checks draw numbers before the first batch.
        if self._generators is not None:
            torch.set_rng_state(self._generators["cpu"])
            if self._generators["cuda"]:
                torch.cuda.set_rng_state_all(self._generators["cuda"])
            self._generators = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def _finish(self) -> None:
        self.result = result = self.adaptation.finish()
        result.source_accuracy_before = self._before
        result.final["source_accuracy"] = self._source_accuracy()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._adaptation is None or trainer.sanity_checking:
            return
        accuracy, forecast = self._source_accuracy(), self._adaptation.forecast()
        if accuracy is not None:
            pl_module.log("source_accuracy", accuracy)
        if forecast is not None:
            pl_module.log("forecast", forecast)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._adaptation is None:
            return
        if self._other_state:  # now that the network is on its device
            self._finish()
            self._other_state = False
        self._averaged.enter_context(self._adaptation.averaged())

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaged.close()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaged.close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaged.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._averaged.close()

    def state_dict(self) -> dict[str, Any]:
        if self._adaptation is None:
            return {}
        average = self._adaptation.average
        if average is not None and average.applies:
            raise RuntimeError(
                "trainer.save_checkpoint() in the middle of an evaluation, where the module holds "
                "the averaged weights, and not those that training goes on from: call it in "
                "on_validation_end, or let ModelCheckpoint do it"
            )
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        generators = {"cpu": torch.get_rng_state(), "cuda": cuda}
        return {"adaptation": self._adaptation.state_dict(), "generators": generators}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._adaptation is not None and state_dict:
            self._adaptation.load_state_dict(state_dict["adaptation"])
            self._generators = state_dict["generators"]
            self._other_state = self.result is not None

    def _source_accuracy(self) -> float | None:
        if self.source is None:
            return None
        device = next(self.network.parameters()).device
        with source_task(self.network):
            return evaluate(self.network, self.source, LEAST_EVAL_BATCH, device).accuracy


class PlannedBatches:
    """The training batches of a callback's plan, from the step it has reached; with
    `grad_accum_steps` these are micro-batches."""

    def __init__(self, callback: FastCallback) -> None:
        self._callback = callback

    def __len__(self) -> int:
        plan = self._callback.adaptation.plan
        return plan.steps * plan.grad_accum_steps

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        adaptation = self._callback.adaptation
        for inputs, labels, rows in adaptation.batches():
            for part in torch.arange(len(labels)).chunk(adaptation.plan.grad_accum_steps):
                yield pick(inputs, part), labels[part], None if rows is None else rows[part]


def _check_trainer(trainer: Trainer) -> None:
    """Raise ValueError for what the method cannot do inside the Trainer."""
    if str(trainer.precision) not in PRECISIONS:
        raise ValueError(
            f"Trainer(precision={str(trainer.precision)!r}) casts the weights, which 32 bits have "
            f"to hold: take one of {', '.join(map(repr, PRECISIONS))}"
        )
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in OTHER_CALLBACKS:
                name = type(callback).__name__
                raise ValueError(f"{name} {OTHER_CALLBACKS[kind.__name__]}")


def _accumulation(trainer: Trainer, options: dict[str, Any]) -> dict[str, int]:
    """How many batches make a step, and the size of a step, which is a multiple of that.

    Raises:
        ValueError: the user's own size is not.
    """
    parts = options.get("grad_accum_steps", trainer.accumulate_grad_batches)
    default = AdaptConfig().batch_size
    size = options.get("batch_size", math.ceil(default / parts) * parts)
    if size % parts:
        raise ValueError(
            f"batch_size={size} must be a multiple of Trainer(accumulate_grad_batches={parts}): it "
            f"is the size of a step, of target and source inputs together; {size // parts * parts} "
            f"or {math.ceil(size / parts) * parts} is"
        )
    return {"grad_accum_steps": parts, "batch_size": size}


def _steps(trainer: Trainer) -> int:
    """The number of optimizer steps that `fit` will take.

    Raises:
        ValueError: the number has no limit.
    """
    steps: float = trainer.max_steps
    if trainer.train_dataloader is not None or steps < 0:
        try:
            steps = trainer.estimated_stepping_batches
        except (AttributeError, TypeError) as error:  # of a loader whose data are not there yet
            raise ValueError(
                f"FastCallback has to know the length of the run, and there is no loader yet "
                f"({first_line(error)}): a LightningModule that makes its data in setup() does so "
                "after FastCallback. Give FastCallback(steps=...) or Trainer(max_steps=...), or "
                "make them in a LightningDataModule"
            ) from error
    if not 0 < steps < math.inf:
        raise ValueError(
            "FastCallback has to know the length of the run: Trainer(max_steps=), or a loader of "
            "known length and max_epochs="
        )
    return int(steps)
