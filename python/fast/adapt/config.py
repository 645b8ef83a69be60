"""Every option of a fine-tuning run in one record; the command line is generated from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from fast.adapt.methods import METHODS

BATCH_NORM_POLICIES = ("frozen", "per_task", "track")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "sgd")
SOURCE_SKILLS = ("auto", "answers", "features")
# More than these are a slip of the pen: a loss of 20 nats is that of guessing among 10^8 classes.
MOST_NATS, MOST, MOST_SEED = 20.0, 10**7, 2**63 - 1


@dataclass(frozen=True)
class Budget:
    """What may be lost: nats of source loss, or points of source accuracy (0..1)."""

    amount: float
    points: bool = False

    @classmethod
    def parse(cls, value: float | str) -> Budget:
        """0.1 and "0.1" are nats, "2%" is points of accuracy.

        Raises:
            ValueError: neither, or not positive.
        """
        text = str(value).strip()
        number, points = (text[:-1], True) if text.endswith("%") else (text, False)
        try:
            amount = float(number) / (100 if points else 1)
        except ValueError:
            amount = math.nan
        if not 0 < amount < (1 if points else MOST_NATS):
            raise ValueError(
                "forget_budget must be nats of source loss (0.1) or points of source accuracy "
                f"('2%'), more than zero, and less than {MOST_NATS:g} nats or 100%; got {value!r}"
            )
        return cls(amount, points)

    def __str__(self) -> str:
        return f"{100 * self.amount:g} %" if self.points else f"{self.amount:g} nats"


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Options of `fast.finetune`. `None` means: the method's own default (`fast.adapt.methods`).

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    method: str = _option("fast", "how to adapt", tuple(METHODS))
    steps: int | None = _option(None, "optimizer steps (default: from --epochs)")
    epochs: int | None = _option(
        None, "passes over the training data (default: 3, and at least 100 steps)"
    )
    batch_size: int = _option(64, "samples per optimizer step")
    lr: float | None = _option(
        None,
        "peak learning rate of the backbone (default: 1e-3; fast 1.5e-3)",
    )
    eval_every: int | None = _option(
        None, "optimizer steps between evaluations (default: 1/10 run)"
    )
    seed: int = _option(0, "seed of head, data order and augmentation")

    head: str | None = _option(
        None, "name of the layer that makes the logits (default: found by running the network)"
    )
    max_entropy: bool | None = _option(
        None,
        "head of zeros on normalised features, else a random one (default: the method's)",
    )
    head_lr_scale: float | None = _option(
        None, "head's lr as a multiple of lr (default: the method's)"
    )
    anchor_decay: float | None = _option(
        None, "pull towards the pretrained weights, times lr (default: the method's)"
    )
    weight_decay: float = _option(0.0, "decoupled weight decay, times lr")
    distill: float | None = _option(
        None, "weight of staying with the source head's answers on target inputs"
    )
    forget_budget: str | float | None = _option(
        None, "what may be lost: nats of source loss (0.1) or points of accuracy (2%)"
    )
    source_skill: str = _option(
        "auto",
        "what must not be forgotten: the source head's answers, or how features lie to each other",
        SOURCE_SKILLS,
    )
    stall: int | None = _option(None, "steps before the backbone moves (default: the method's)")
    ramp: int | None = _option(
        None, "steps over which the backbone's lr then rises (default: the method's)"
    )
    head_steps: int | None = _option(
        None, "steps of the head alone on features computed beforehand (default: the method's)"
    )
    rehearse: float | None = _option(
        None,
        "weight of keeping the features of source inputs, or without them of the target's own "
        "(default: the method's)",
    )
    average: int | None = _option(
        None, "steps over which the weights are averaged; 0 keeps the last (default: the method's)"
    )
    probe_steps: int | None = _option(
        None, "lp-ft: steps of linear probing (default: 1/6 of the run)"
    )
    batch_norm: str | None = _option(
        None,
        "what backbone batch norm does (default: per_task where features are rehearsed, else "
        "frozen)",
        BATCH_NORM_POLICIES,
    )

    optimizer: str = _option("adamw", "update rule", OPTIMIZERS)
    schedule: str = _option("cosine", "learning-rate schedule", SCHEDULES)
    warmup: int = _option(0, "steps of linear warm-up")
    grad_accum_steps: int = _option(1, "micro-batches per optimizer step")
    max_grad_norm: float | None = _option(None, "clip the global gradient norm to this")
    precision: str = _option("auto", "arithmetic of the forward pass", PRECISIONS)
    label_smoothing: float = _option(0.0, "label smoothing of the cross-entropy")
    class_weights: str | tuple[float, ...] | None = _option(
        None, "'balanced', or one weight per class"
    )
    patience: int | None = _option(None, "stop after this many evaluations without a better val")

    device: str | None = _option(
        None, "cpu, cuda, cuda:1, ... (default: FAST_DEVICE, or CUDA if there)"
    )
    output: str | None = _option(None, "folder for model, checkpoints, config and log")
    save_every: int | None = _option(None, "steps between checkpoints (default: at evaluations)")
    resume: str | None = _option(None, "folder of an interrupted run to go on with")
    progress: bool | None = _option(None, "progress bar (default: when stderr is a terminal)")

    def __post_init__(self) -> None:
        self._make_plain()
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            value = getattr(self, f.name)
            if choices and value not in choices and (value is not None or f.default is not None):
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")
        positive = (
            "batch_size",
            "grad_accum_steps",
            "steps",
            "epochs",
            "eval_every",
            "save_every",
            "patience",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        not_negative = (
            "seed",
            "anchor_decay",
            "distill",
            "weight_decay",
            "stall",
            "ramp",
            "warmup",
            "head_steps",
            "rehearse",
            "average",
            "probe_steps",
        )
        for name in not_negative:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                wrong = "must not be negative" if value < 0 else "must be finite"
                raise ValueError(f"{name} {wrong}; got {value}")
        for name in ("lr", "head_lr_scale", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive; got {value}")
        if self.forget_budget is not None:
            Budget.parse(self.forget_budget)
            if self.patience is not None:
                raise ValueError(
                    "patience goes back to weights that forget_budget has not checked: drop one"
                )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of grad_accum_steps "
                f"({self.grad_accum_steps}): every micro-batch has the same size"
            )

    def _make_plain(self) -> None:
        """Paths, devices, numpy's numbers and tensors of weights as JSON has them.

        A run is then what its saved options say, and can be compared with them.
        """
        plain: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), str(f.type)
            if value is None:
                continue
            if f.name in ("output", "resume", "device"):
                plain[f.name] = str(value)
            elif kind.startswith("int"):
                if isinstance(value, bool) or not isinstance(value, Integral):
                    raise ValueError(f"{f.name} must be a whole number; got {value!r}")
                most = MOST_SEED if f.name == "seed" else MOST
                if int(value) > most:
                    raise ValueError(f"{f.name} must be at most {most}; got {value}")
                plain[f.name] = int(value)
            elif kind.startswith("float"):
                if isinstance(value, bool) or not isinstance(value, Real):
                    raise ValueError(f"{f.name} must be a number; got {value!r}")
                plain[f.name] = float(value)
            elif f.name == "class_weights" and not isinstance(value, str):
                try:
                    plain[f.name] = tuple(float(weight) for weight in value)
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"class_weights must be 'balanced' or one weight per class; got {value!r}"
                    ) from error
        for name, value in plain.items():
            object.__setattr__(self, name, value)  # the record is frozen
