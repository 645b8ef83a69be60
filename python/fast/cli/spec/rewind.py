"""The options of `fast rewind`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self, get_args

from fast.adapt.config import Budget, SourceSkill
from fast.cli.options import option, part
from fast.cli.spec.base import SAVED, Spec, device_option
from fast.cli.spec.task import TaskSpec
from fast.cli.values import folder_name

LEFT_OUT = (
    "weights", "allow_missing", "source", "card", "val_fraction", "flip", "augment", "folds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RewindSpec(Spec):
    r"""Undo forgetting: take a fine-tuned network back to where it keeps a budget.

      fast rewind --model "nets.py:ResNet(20)" --base resnet20.safetensors \
          --tuned signs.pt --source-inputs cifar10.npz --budget 2% --data signs.npz
      fast rewind --base timm:resnet18 --tuned finetuned.pth \
          --source-inputs old/ --budget 0.1

    --tuned is a checkpoint that was fine-tuned from --base, by any tool; the two heads may differ.
    Without --data the budget is kept, but the accuracy that is left on the target is not measured.
    Writes what fast finetune writes, and rewind.png, to --output.
    """

    about = "take a network that has forgotten back to a forgetting budget"
    package = SAVED

    base: str = option(
        "the weights before fine-tuning: safetensors, or a torch state dict; or a network by name, "
        "as --model, with its own weights",
        "",
        metavar="FILE",
    )
    tuned: str = option(
        "the weights after it: a file, or the folder of a run or of a transformers network",
        "",
        metavar="FILE",
    )
    budget: str = option(
        "what may be lost: nats of source loss (0.1) or points of accuracy (2%)", "", metavar="X"
    )
    source_skill: str = option(
        "what must not be forgotten: answers of the head, or how features lie to each other",
        "auto",
        choices=get_args(SourceSkill),
    )
    seed: int = option("seed that draws the target samples", 0)
    device: str | None = device_option()
    output: str | None = option(
        "folder of the results (default: a new one, runs/...-rewind)", read=folder_name
    )
    task: TaskSpec = field(default_factory=TaskSpec, metadata=part("data", LEFT_OUT))

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """--base may name the network, too."""
        base = options.get("base", "")
        if "model" not in options and (
            ":" in base and (".py:" in base or not base.endswith(".pt"))
        ):
            options = options | {"model": base, "base": ""}
        return super().parse(options)

    def __post_init__(self) -> None:
        missing = [f"--{name}" for name in ("tuned", "budget") if not getattr(self, name)]
        if not self.task.source_inputs:
            missing.append("--source-inputs")
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given; see --help")
        if not self.task.model:
            raise ValueError(
                "--model must be given, the network that the weights are of (or --base names it, "
                "as timm:resnet18); see --help"
            )
        Budget.parse(self.budget, "--budget")

    @property
    def named(self) -> TaskSpec:
        """Network and data, with the weights before fine-tuning."""
        return replace(self.task, weights=self.base or None)
