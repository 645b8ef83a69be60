"""The options of each command, as a record.

The docstring of a command's record is its `--help`. A record checks itself: what is wrong with the
options is raised before anything is read or written.
"""

from __future__ import annotations

from dataclasses import dataclass

from fast.cli.options import option
from fast.cli.spec.base import Spec, at_least, required
from fast.cli.spec.curvature import CurvatureSpec
from fast.cli.spec.deploy import EvaluateSpec, ExportSpec, PredictSpec
from fast.cli.spec.finetune import FinetuneSpec
from fast.cli.spec.join import JoinSpec
from fast.cli.spec.methods import CompareSpec, LandscapeSpec, RetentionSpec
from fast.cli.spec.rewind import RewindSpec
from fast.cli.spec.synthetic import SyntheticSpec
from fast.cli.values import folder_name, shape


@dataclass(frozen=True, kw_only=True)
class EnvSpec(Spec):
    """Versions, hardware, and which kernel backend runs where; what is missing, and why."""

    about = "versions, hardware, and which kernels run here"

    json: bool = option("print JSON", False)


@dataclass(frozen=True, kw_only=True)
class AuditSpec(Spec):
    """Second derivatives of a network's modules: torch's own, ours, and what differences say.

      fast audit --model nets.py:Net --input 8x3x32x32
      fast audit --model bert.py:Bert --input 2x16 --tokens 30522

    Runs in float64 on random inputs, in eval mode, and names the modules whose second derivatives
    are wrong or missing in the version of torch that is installed.
    """

    about = "which modules have wrong second derivatives in torch"

    model: str | None = option("network by name, as in fast finetune", metavar="SPEC")
    input: tuple[int, ...] | None = option("shape of the input", read=shape, metavar="NxN")
    tokens: int = option("inputs are whole numbers below this; 0: normal random numbers", 0)
    train: bool = option("in train mode", False)
    seed: int = option("seed of weights, inputs and directions", 0)

    def __post_init__(self) -> None:
        required(self, "model", "input")
        at_least(self, "tokens", 0)


@dataclass(frozen=True, kw_only=True)
class DemoSpec(Spec):
    """The effect in a minute, offline: teach a network of digits 0-4 the digits 5-9.

    Pretrains a small convolutional network on scikit-learn's digits 0-4, adapts it to 5-9 by
    `vanilla` fine-tuning and by `fast`, over three seeds, and prints what each learned and what
    each kept. Vanilla gets the better of two learning rates; fast runs at the larger one.
    """

    about = "the effect in a minute: offline, on scikit-learn's digits"

    output: str = option("folder of demo.png", "fast-demo", read=folder_name)


COMMANDS: dict[str, type[Spec]] = {
    "finetune": FinetuneSpec,
    "predict": PredictSpec,
    "evaluate": EvaluateSpec,
    "export": ExportSpec,
    "join": JoinSpec,
    "compare": CompareSpec,
    "retention": RetentionSpec,
    "rewind": RewindSpec,
    "synthetic": SyntheticSpec,
    "curvature": CurvatureSpec,
    "landscape": LandscapeSpec,
    "audit": AuditSpec,
    "env": EnvSpec,
    "demo": DemoSpec,
}
