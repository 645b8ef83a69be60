"""The options of `fast curvature`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fast.cli.options import option, part
from fast.cli.spec.base import Spec, at_least, device_option, output_folder, required
from fast.cli.spec.finetune import run_options
from fast.cli.spec.task import TaskSpec
from fast.cli.values import folder_name
from fast.files import JOB_FILE

# What a job file says about network and data.
FROM_JOB = (
    "model", "data", "source", "val_fraction", "input_size", "resize", "interpolation", "mean",
    "std", "skip_broken", "input_column", "label_column", "max_length",
)  # fmt: skip
MOST_TOP = 200


@dataclass(frozen=True, kw_only=True)
class CurvatureSpec(Spec):
    r"""Curvature of the source and the target loss: eigenvalues, trace, density, layers.

      fast curvature --checkpoint runs/ResNet-signs-fast
      fast curvature --checkpoint adapted/ --model nets.py:ResNet(20) \
          --data signs.npz --source cifar10.npz
      fast curvature --model timm:resnet18 --source imagenet-part/

    A checkpoint is what `fast finetune --output` or `Result.save` wrote; that of `fast finetune`
    names model and data. The loss on --data is that of the target task, by the checkpoint's head;
    the loss on --source is that of the source task, by the head from before. A network without a
    checkpoint has only its own task. Writes curvature.json and spectrum.png to --output.
    """

    about = "eigenvalues, trace and density of source and target loss"

    checkpoint: str | None = option("folder of an adapted network", read=folder_name)
    output: str | None = output_folder("curvature/ in the checkpoint")
    kind: str = option("which matrix of second derivatives", "hessian", choices=("hessian", "ggn"))
    params: str | None = option(
        "only parameters whose whole name matches (default: all)", metavar="REGEX"
    )
    samples: int = option(
        "samples of each task, drawn by --seed, from training data if there are some", 256
    )
    batch_size: int = option("samples in a pass; fewer take less memory", 64)
    top: int = option("eigenvalues of largest magnitude", 5)
    trace_products: int = option("matrix-vector products for a trace", 48)
    probes: int = option("random vectors for the spectral density; 0: none", 4)
    lanczos_steps: int = option("matrix-vector products for each of --probes", 48)
    seed: int = option("seed of samples and probes", 0)
    layers: bool = option("print and save a table by layer", True)
    device: str | None = device_option()
    progress: bool | None = option("progress bars (default: in a terminal or a notebook)")
    task: TaskSpec = field(
        default_factory=TaskSpec,
        metadata=part("data", ("source_inputs", "card", "folds", "augment", "flip")),
    )

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """Model and data are as `fast finetune` had them, where the command line does not say."""
        if "checkpoint" in options:
            folder = Path(options["checkpoint"])
            if not folder.is_dir():
                raise FileNotFoundError(f"--checkpoint {folder}: no such folder")
            if (folder / JOB_FILE).is_file():
                job = run_options(folder, "--checkpoint", named="model" in options)
                # Data that are named here take the place of all the recorded ones.
                own_data = {"data", "source"} & set(options)
                names = set(FROM_JOB) - ({"data", "source"} if own_data else set())
                options = {k: v for k, v in job.items() if k in names} | options
        return super().parse(options)

    def __post_init__(self) -> None:
        required(self.task, "model")
        for name in ("samples", "batch_size", "top", "lanczos_steps"):
            at_least(self, name, 1)
        at_least(self, "trace_products", 6)
        at_least(self, "probes", 0)
        if self.top > MOST_TOP:
            raise ValueError(
                f"--top must be at most {MOST_TOP}; got {self.top}: each is a vector of the size "
                "of the network. --probes gives the density of all"
            )
        if not (self.task.data or self.task.source):
            raise ValueError("--source or --data must be given; see --help")
        if self.task.data and not self.checkpoint:
            raise ValueError(
                "--data is the target task, and needs a --checkpoint with a head for it; the task "
                "that the network itself was trained on goes to --source"
            )
        if self.checkpoint and self.task.weights:
            raise ValueError("--weights: the checkpoint has the weights; drop one of the two")
