"""The options of `fast synthetic`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fast.cli.options import option, part
from fast.cli.spec.base import Spec, at_least, device_option, required
from fast.cli.spec.task import TaskSpec
from fast.cli.values import folder_name

LEFT_OUT = ("source", "source_inputs", "card", "val_fraction", "folds", "augment", "flip")
SUFFIX = ".npz"


@dataclass(frozen=True, kw_only=True)
class SyntheticSpec(Spec):
    r"""Inputs that stand in for source inputs, made of a network's batch norms and its head.

      fast synthetic --model timm:resnet18 --data photos/ --output made.npz
      fast finetune --model timm:resnet18 --data photos/ --source-inputs made.npz

    They are made once for a network: inputs of --data are changed until the network takes them for
    inputs of its own task. Each costs as much as --steps training samples. Some inputs of --data
    are added as they are. The network needs batch norm (docs/no-source-data.md).
    """

    about = "stand-ins for source inputs, made of a network's batch norms"

    output: str = option(f"file to write, FILE{SUFFIX}", "", read=folder_name)
    count: int = option("how many to make", 256)
    own: int | None = option(
        "how many training inputs of --data are added as they are (default: --count if there are "
        "2,000 or more, else fewer in proportion)"
    )
    steps: int = option("optimisation steps for each input", 20)
    batch_size: int = option("how many are made at once; fewer take less memory", 64)
    seed: int = option("seed of the inputs that are drawn, and of their classes", 0)
    device: str | None = device_option()
    task: TaskSpec = field(default_factory=TaskSpec, metadata=part("data", LEFT_OUT))

    def __post_init__(self) -> None:
        required(self.task, "model", "data")
        if not self.output.endswith(SUFFIX):
            raise ValueError(f"--output must be given: a file that ends in {SUFFIX}")
        at_least(self, "count", 4)
        at_least(self, "steps", 1)
        at_least(self, "batch_size", 2)
