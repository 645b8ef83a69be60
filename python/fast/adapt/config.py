"""The options of an adaptation, checked one by one."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

from fast.adapt.methods import METHODS, MethodName, default_method
from fast.errors import did_you_mean, warn
from fast.models.head_option import KEEP, head_name

Tasks = Literal["together", "switched"]
BatchNormPolicy = Literal["frozen", "per_task", "track"]
OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "constant"]
SourceSkill = Literal["auto", "answers", "features"]
# Larger numbers must be typos: a loss of 20 nats is that of guessing among 10^8 classes.
MOST_NATS, MOST, MOST_SEED = 20.0, 10**7, 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be lost: nats of source loss, or points of source accuracy (0..1)."""

    amount: float
    points: bool = False

    @classmethod
    def parse(cls, value: float | str, name: str = "forget_budget") -> Budget:
        """Read a budget: 0.1 and "0.1" are nats, "2%" is points of accuracy.

        Args:
            name: the argument that it is given by, for the message.

        Raises:
            ValueError: the value is neither, or is not positive.
        """
        text = str(value).strip()
        number, points = (text[:-1], True) if text.endswith("%") else (text, False)
        try:
            amount = float(number) / (100 if points else 1)
        except ValueError:
            amount = math.nan
        if not 0 < amount < (1 if points else MOST_NATS):
            raise ValueError(
                f"{name} must be nats of source loss (0.1) or points of source accuracy "
                f"('2%'), more than zero, and less than {MOST_NATS:g} nats or 100%; got {value!r}"
            )
        return cls(amount=amount, points=points)

    def warn_of_nats(self, name: str) -> None:
        """Warn of so many nats that points of accuracy may be meant by the argument `name`."""
        if not self.points and self.amount >= 1:
            warn(
                f"{name} {self} lets the source loss rise by as much; points of accuracy are "
                f"written '{self.amount:g}%'"
            )

    def __str__(self) -> str:
        return f"{100 * self.amount:g} %" if self.points else f"{self.amount:g} nats"


def setting(
    default: Any,
    help: str,
    *,
    choices: Any = None,
    least: int | None = None,
    positive: bool = False,
    free: bool = False,
) -> Any:
    """A field of an options record.

    Args:
        choices: the `Literal` of the allowed values.
        least: the smallest allowed value, 0 or 1.
        positive: values must be more than 0.
        free: the option decides where a run computes or how it is shown, not what it computes, so
            it is free to differ on resume.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": typing.get_args(choices) or None,
            "least": least,
            "positive": positive,
            "free": free,
        },
    )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Options of `fast.Adaptation`. `None` stands for the method's own default (`METHODS`), and of
    `method` for `default_method`, which it becomes.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    method: str = setting(
        None,
        "how to adapt (default: fast; adapter where the tasks are switched)",
        choices=MethodName,
    )
    steps: int | None = setting(None, "optimizer steps (default: from --epochs)", least=1)
    epochs: int | None = setting(
        None, "passes over the training data (default: 3, and at least 100 steps)", least=1
    )
    batch_size: int = setting(64, "samples per optimizer step", least=1)
    lr: float | None = setting(
        None,
        "peak learning rate of the backbone (default: 1e-3; fast 1.5e-3, or 5e-4 with layer norms; "
        "adapter 1e-2, less in batches of fewer than 64; 20 times that with sgd)",
        positive=True,
    )
    seed: int = setting(0, "seed of head, data order and augmentation", least=0)

    head: str | None = setting(
        None,
        "'new' (the default) replaces the layer that makes the logits, 'keep' goes on with it; "
        "or the name of that layer, where running the network does not find it",
    )
    max_entropy: bool | None = setting(
        None, "head of zeros on normalised features, else a random one (default: the method's)"
    )
    head_lr_scale: float | None = setting(
        None, "head's lr as a multiple of lr (default: the method's)", positive=True
    )
    anchor_decay: float | None = setting(
        None, "pull towards the pretrained weights, times lr (default: the method's)", least=0
    )
    weight_decay: float = setting(0.0, "decoupled weight decay, times lr", least=0)
    head_decay: float | None = setting(
        None,
        "that of the new head, times its lr; above 0 the statistics of its features stay (default: "
        "the method's)",
        least=0,
    )
    distill: float | None = setting(
        None, "weight of staying with the source head's answers on target inputs", least=0
    )
    forget_budget: str | float | None = setting(
        None, "what may be lost: nats of source loss (0.1) or points of accuracy (2%)"
    )
    source_skill: str = setting(
        "auto",
        "what must not be forgotten: the source head's answers, or how features lie to each other",
        choices=SourceSkill,
    )
    stall: int | None = setting(
        None, "steps before the backbone moves (default: the method's)", least=0
    )
    ramp: int | None = setting(
        None, "steps over which the backbone's lr then rises (default: the method's)", least=0
    )
    head_steps: int | None = setting(
        None,
        "steps of the head alone on features computed beforehand (default: the method's)",
        least=0,
    )
    rehearse: float | None = setting(
        None,
        "weight of keeping the features of source inputs, or without them of the target's own, of "
        "which pictures get their patches shuffled (default: the method's)",
        least=0,
    )
    average: int | None = setting(
        None,
        "steps over which the weights are averaged; 0 keeps the last (default: the method's)",
        least=0,
    )
    probe_steps: int | None = setting(
        None, "lp-ft: steps of linear probing (default: 1/6 of the run)", least=0
    )
    batch_norm: str | None = setting(
        None,
        "what backbone batch norm does (default: per_task where features are rehearsed, else "
        "frozen)",
        choices=BatchNormPolicy,
    )
    dropout: bool | None = setting(
        None,
        "whether the network's dropout is active (default: yes, but with fast and adapter not "
        "where it drowns what distinguishes the inputs)",
    )
    tasks: str | None = setting(
        None,
        "one function answers both tasks ('together'), or what is kept per task is switched "
        "(default: switched where batch norm is per_task, or with adapters)",
        choices=Tasks,
    )
    adapter_rank: int | None = setting(
        None, "adapter: rank of the adapters (default: 32, with layer norms 8)", least=1
    )

    optimizer: str = setting("adamw", "update rule", choices=OptimizerName)
    schedule: str = setting("cosine", "learning-rate schedule", choices=Schedule)
    warmup: int = setting(0, "steps of linear warm-up", least=0)
    grad_accum_steps: int = setting(1, "micro-batches per optimizer step", least=1)
    max_grad_norm: float | None = setting(
        None,
        "clip the global gradient norm to this (default: 1 with sgd and a ramp, else none)",
        positive=True,
    )
    shard: bool = setting(
        False, "shard weights and optimizer over the processes of torchrun (FSDP2)", free=True
    )

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for f in dataclasses.fields(self):
            value = self._plain(f.name, getattr(self, f.name), types[f.name])
            object.__setattr__(self, f.name, value)  # the record is frozen
            if value is not None or f.default is not None:
                _check_value(f, value)
        if self.method is None:
            object.__setattr__(self, "method", default_method(self.tasks))
        if self.forget_budget is not None:
            Budget.parse(self.forget_budget)
        self._check_tasks()
        if self.has_adapters:
            self._check_adapter()
        elif self.adapter_rank is not None:
            raise ValueError(f"adapter_rank is for method 'adapter'; {self.method!r} has none")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of grad_accum_steps "
                f"({self.grad_accum_steps}): every micro-batch has the same size"
            )

    @property
    def budget(self) -> Budget | None:
        """`forget_budget`, parsed."""
        return None if self.forget_budget is None else Budget.parse(self.forget_budget)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters learn the target, in place of the weights."""
        return self.method in METHODS and METHODS[self.method].adapter_rank > 0

    @property
    def keeps_head(self) -> bool:
        """Whether the network goes on with its own head, and its own task."""
        return self.head == KEEP

    @property
    def head_name(self) -> str | None:
        """The name of the layer that makes the logits, if the user gave it."""
        return head_name(self.head)

    @classmethod
    def free_on_resume(cls) -> set[str]:
        """Names of the options that may differ in a resumed run: see `setting`."""
        return {f.name for f in dataclasses.fields(cls) if f.metadata["free"]}

    def computed(self) -> dict[str, Any]:
        """The options that decide what is computed, as JSON has them."""
        options = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in options.items() if name not in self.free_on_resume()}

    def _check_tasks(self) -> None:
        """Raise ValueError where `tasks` contradicts another option."""
        if self.tasks == "together" and self.batch_norm == "per_task":
            raise ValueError(
                "tasks='together' has one function, and batch_norm='per_task' makes two: use "
                "'frozen' or 'track', or tasks='switched'"
            )
        if self.tasks == "together" and self.has_adapters:
            raise ValueError(
                f"tasks='together' has one function, and method {self.method!r} makes two: use "
                "'fast', or tasks='switched'"
            )
        if self.tasks != "switched":
            return
        if self.keeps_head:
            raise ValueError(
                "tasks='switched' tells two tasks apart, and with head='keep' there is one"
            )
        if self.batch_norm in ("frozen", "track") and not self.has_adapters:
            raise ValueError(
                f"tasks='switched' switches what is kept per task, and with batch_norm="
                f"{self.batch_norm!r} there is nothing: use 'per_task', or method='adapter'"
            )

    def _check_adapter(self) -> None:
        """Raise ValueError for options that make no sense with adapters."""
        holds = ("anchor_decay", "distill", "rehearse", "forget_budget")
        for name in holds:
            if getattr(self, name):
                raise ValueError(
                    f"{name} holds the source task, and method 'adapter' changes nothing of it: "
                    f"leave {name} out, or use 'fast'"
                )
        if self.keeps_head:
            raise ValueError(
                "method 'adapter' makes two functions, and head='keep' goes on with one: use "
                "'fast', or head='new'"
            )
        if self.batch_norm == "track":
            raise ValueError(
                "batch_norm='track' changes the statistics that the source task uses, and method "
                "'adapter' changes nothing of it: use 'per_task' or 'frozen'"
            )
        if self.shard:
            raise ValueError(
                "shard=True shards the weights that learn, and method 'adapter' learns few beside "
                "them: leave shard out, or use 'fast'"
            )

    def _plain(self, name: str, value: Any, kinds: tuple[type, ...]) -> Any:
        """The value as JSON has it: numpy's numbers become Python's.

        Raises:
            ValueError: the value is of another type than `kinds`, or larger than any that is meant.
        """
        if value is None or str in kinds:
            return value
        if bool in kinds:
            return boolean(name, value)
        if int in kinds:
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number; got {value!r}")
            most = MOST_SEED if name == "seed" else MOST
            if int(value) > most:
                raise ValueError(f"{name} must be at most {most}; got {value}")
            return int(value)
        if float in kinds:
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name} must be a number; got {value!r}")
            return float(value)
        return value


class AdaptOptions(TypedDict, total=False):
    """The fields of `AdaptConfig` as keyword arguments, for type checkers."""

    method: MethodName | None
    steps: int | None
    epochs: int | None
    batch_size: int
    lr: float | None
    seed: int
    head: str | None
    max_entropy: bool | None
    head_lr_scale: float | None
    anchor_decay: float | None
    weight_decay: float
    head_decay: float | None
    distill: float | None
    forget_budget: str | float | None
    source_skill: SourceSkill
    stall: int | None
    ramp: int | None
    head_steps: int | None
    rehearse: float | None
    average: int | None
    probe_steps: int | None
    batch_norm: BatchNormPolicy | None
    dropout: bool | None
    tasks: Tasks | None
    adapter_rank: int | None
    schedule: Schedule
    warmup: int
    grad_accum_steps: int
    max_grad_norm: float | None
    shard: bool


def field_types(record: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of an options record takes, apart from None."""
    types = {}
    for name, hint in typing.get_type_hints(record).items():
        members = typing.get_args(hint) or (hint,)
        types[name] = tuple(m for m in members if m is not type(None))
    return types


def check_options(options: Iterable[str], config: type[AdaptConfig], caller: str) -> None:
    """Raise TypeError where `config` has no field of the name of an option."""
    fields = {f.name for f in dataclasses.fields(config)}
    if unknown := sorted(set(options) - fields):
        hint = did_you_mean(unknown[0], fields) or f". Known: {', '.join(sorted(fields))}"
        raise TypeError(f"{caller} got unknown options: {', '.join(unknown)}{hint}")


def boolean(name: str, value: Any) -> bool:
    """A truth value as Python's own.

    Raises:
        ValueError: `value`, which messages call `name`, is something else.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's has either name
        raise ValueError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError where an option has a value that its `setting` does not allow."""
    name, choices, least = item.name, item.metadata["choices"], item.metadata["least"]
    if choices:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    elif value is None:
        raise ValueError(f"{name} must not be None; leave it out for {item.default}")
    elif least == 1 and value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    elif least == 0 and not 0 <= value < math.inf:
        wrong = "must not be negative" if value < 0 else "must be finite"
        raise ValueError(f"{name} {wrong}; got {value}")
    elif item.metadata["positive"] and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive; got {value}")
