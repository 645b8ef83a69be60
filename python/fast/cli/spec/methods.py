"""The options of commands that run several methods on one task."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from fast.adapt.methods import METHODS
from fast.cli.options import flag, option, part
from fast.cli.spec.base import Spec, at_least, output_folder, required
from fast.cli.spec.task import TaskSpec
from fast.cli.values import budget_list, names, numbers, whole_numbers
from fast.train.config import TrainConfig

ALL = "all"
# Options of a training run that these commands set themselves: all of them set SINGLE, those with
# several runs of a method SWEPT, and the one that varies what holds the source HOLDING.
SINGLE = ("method", "output", "resume", "save_every")
SWEPT = (*SINGLE, "seed", "lr")
HOLDING = ("anchor_decay", "distill", "rehearse", "forget_budget")
STRENGTHS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
# Length of a run on the digits of --demo.
DEMO_LENGTH = {"steps": 100, "eval_every": 5}


def _methods(*default: str) -> Any:
    return option(f"methods to run: {', '.join(METHODS)}, or all", default, read=names)


@dataclass(frozen=True, kw_only=True)
class MethodsSpec(Spec):
    """The options that are shared by commands which run several methods on one task."""

    needs: ClassVar[tuple[str, ...]] = ("model", "data", "source")

    methods: tuple[str, ...] = _methods("fast", "vanilla")
    output: str | None = output_folder("runs/COMMAND-MODEL-DATA")
    demo: bool = option(
        "digits 0-4, then 5-9, of scikit-learn (offline) in place of --model and --data", False
    )
    task: TaskSpec = field(default_factory=TaskSpec, metadata=part("data", ("folds",)))
    training: TrainConfig = field(default_factory=TrainConfig, metadata=part("training", SINGLE))

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        if options.get("demo") and "epochs" not in options:
            options = DEMO_LENGTH | options
        return super().parse(options)

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in (*METHODS, ALL)]
        if unknown:
            raise ValueError(f"--methods: no method {unknown[0]!r}; there are {', '.join(METHODS)}")
        if not self.demo:
            required(self.task, *self.needs)
            return
        for name in ("model", "weights", "data", "source", "source_inputs", "card"):
            if getattr(self.task, name):
                raise ValueError(f"--demo brings its own model and data; drop {flag(name)}")


@dataclass(frozen=True, kw_only=True)
class SweepSpec(MethodsSpec):
    """The options of commands that run each method with several seeds and learning rates."""

    seeds: tuple[int, ...] = option(
        "each method runs once with each of these seeds", (0,), read=whole_numbers
    )
    lr: tuple[float, ...] | None = option(
        "learning rates; of several, the first seed tries all, and the other seeds run at the one "
        "with the best target accuracy (default: the method's own rate)",
        read=numbers,
        metavar="X[,X]",
    )

    @property
    def learning_rates(self) -> tuple[float | None, ...]:
        """The rates to try; None is the method's own."""
        return self.lr or (None,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for lr, seed in itertools.product(self.learning_rates, self.seeds):
            replace(self.training, lr=lr, seed=seed)  # raises what is wrong with them


@dataclass(frozen=True, kw_only=True)
class CompareSpec(SweepSpec):
    r"""Run several methods on the same job: a table, curves.png and a self-contained report.html.

      fast compare --methods fast,vanilla,l2-sp,lp-ft --seeds 0,1,2 \
          --model nets.py:ResNet(20) --weights resnet20.safetensors \
          --data signs.npz --source cifar10.npz --steps 150
      fast compare --demo --methods all --seeds 0,1,2

    Finished runs are kept in --output: the same command goes on where it was interrupted, and one
    with more methods or seeds runs only what is new.
    """

    about = "run several methods on the same job: table, curves, report"
    needs = ("model", "data")
    training: TrainConfig = field(default_factory=TrainConfig, metadata=part("training", SWEPT))


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(SweepSpec):
    r"""The trade-off curve of a method, target against source accuracy, over its strength.

      fast retention --methods fast,l2-sp --strengths 0,0.3,1,3,10 --seeds 0,1,2 \
          --model nets.py:ResNet(20) --weights resnet20.safetensors \
          --data signs.npz --source cifar10.npz --steps 150

    Strength 1 is the method as it is; others multiply what it holds the source with: its pull
    towards the pretrained weights, its distillation and its rehearsal of source inputs. With
    --budgets the curve is drawn over forget_budget. A method that holds nothing (vanilla, lp-ft,
    replay) is one point. Finished runs are kept in --output: the same command goes on where it was
    interrupted.
    """

    about = "the trade-off curve of a method: target against source"

    methods: tuple[str, ...] = _methods("fast")
    strengths: tuple[float, ...] | None = option(
        f"factors on what the method holds the source with (default: "
        f"{','.join(f'{s:g}' for s in STRENGTHS)})",
        read=numbers,
    )
    budgets: tuple[str, ...] | None = option(
        "sweep forget_budget in place of the strength: nats (0.1) or points (2%)",
        read=budget_list,
    )
    training: TrainConfig = field(
        default_factory=TrainConfig,
        metadata=part("training", (*SWEPT, *HOLDING)),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strengths and self.budgets:
            raise ValueError("give --strengths or --budgets, not both")
        if any(not 0 <= s < float("inf") for s in self.strengths or ()):
            raise ValueError(f"--strengths must be 0 or more; got {min(self.strengths or ()):g}")


@dataclass(frozen=True, kw_only=True)
class LandscapeSpec(MethodsSpec):
    r"""Source and target loss over the plane that an adaptation moves in, and how its steps lie.

      fast landscape --methods fast,vanilla \
          --model nets.py:ResNet(20) --weights resnet20.safetensors \
          --data signs.npz --source cifar10.npz --steps 150
      fast landscape --demo

    Each method runs once, with its weights kept at every evaluation (--eval-every). The figure
    shows both losses over the plane, with the paths (the target head of the first method answers
    all over it); the share of each step that lies in the stiffest directions of the source loss;
    and the forecast rise of the source loss against the measured one.
    """

    about = "both losses over the plane of an adaptation, and its path"

    resolution: int = option("points along the longer side of the plane", 21)
    samples: int = option("samples of each task, for losses and curvature", 256)
    stiff: int = option("number of stiff directions", 5, metavar="K")
    matrix: str = option(
        "curvature of the source loss: ggn (Gauss-Newton) or hessian",
        "ggn",
        choices=("ggn", "hessian"),
    )
    training: TrainConfig = field(
        default_factory=TrainConfig, metadata=part("training", (*SINGLE, "patience"))
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("resolution", 3), ("samples", 2), ("stiff", 1)):
            at_least(self, name, least)
        if self.training.batch_norm == "track":
            raise ValueError(
                "--batch-norm track changes the source loss by statistics, not weights: use frozen"
            )
        still = [m for m in self.methods if m != ALL and METHODS[m].adapter_rank]
        if still:
            raise ValueError(
                f"--methods: {still[0]} moves no weight of the source task: it has no path to draw"
            )
