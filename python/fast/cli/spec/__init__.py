"""What can be said to each command, as a record.

The docstring of a command's record is its `--help`. A record checks itself: what is wrong with the
options is raised before anything is read or written.
"""

from __future__ import annotations

from dataclasses import dataclass

from fast.cli.options import option
from fast.cli.spec.base import Spec
from fast.cli.spec.curvature import CurvatureSpec
from fast.cli.spec.deploy import EvaluateSpec, ExportSpec, PredictSpec
from fast.cli.spec.finetune import FinetuneSpec
from fast.cli.spec.methods import CompareSpec, LandscapeSpec, RetentionSpec
from fast.cli.values import folder_name


@dataclass(frozen=True, kw_only=True)
class EnvSpec(Spec):
    """Versions, hardware, and which kernel backend runs where; what is missing, and why."""

    about = "versions, hardware, and which kernels run here"

    json: bool = option("print JSON", False)


@dataclass(frozen=True, kw_only=True)
class DemoSpec(Spec):
    """The effect in a minute, offline: teach a network of digits 0-4 the digits 5-9.

    Pretrains a small convolutional network on scikit-learn's digits 0-4, adapts it to 5-9 by
    `vanilla` fine-tuning and by `fast`, over three seeds, and prints what each learned and what
    each kept. Vanilla gets the better of two learning rates; fast its defaults.
    """

    about = "the effect in a minute: offline, on scikit-learn's digits"

    output: str = option("of demo.png", "fast-demo", read=folder_name)


COMMANDS: dict[str, type[Spec]] = {
    "finetune": FinetuneSpec,
    "predict": PredictSpec,
    "evaluate": EvaluateSpec,
    "export": ExportSpec,
    "compare": CompareSpec,
    "retention": RetentionSpec,
    "curvature": CurvatureSpec,
    "landscape": LandscapeSpec,
    "env": EnvSpec,
    "demo": DemoSpec,
}
