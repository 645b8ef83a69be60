"""The options of `fast finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fast.adapt.config import Budget
from fast.cli.job_file import FILES, check_files, is_gone, read_job
from fast.cli.options import flag, option, parser_of, part
from fast.cli.spec.base import Spec, required
from fast.cli.spec.task import TaskSpec
from fast.files import JOB_FILE
from fast.train.config import TrainConfig

# With --resume everything else is as it was; the model may be named again, and is compared.
FREE_ON_RESUME = {"resume", "device", "progress", "model", "plan"}


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec(Spec):
    r"""Adapt a pretrained classifier to new data, and say what it still knows of the old.

      fast finetune --model timm:resnet18 --data photos/ --epochs 5
      fast finetune --model nets.py:ResNet(20) --weights resnet20.safetensors \
          --data signs.npz --source cifar10.npz --steps 150
      fast finetune --resume runs/ResNet-signs-fast

    The folder --output then holds model.safetensors (loads into the plain network), result.json,
    history.jsonl, the options in fast.json and job.json, preprocessing.json, data.json, and the
    last checkpoint. `fast predict`, `fast evaluate` and `fast export` read it.
    """

    about = "adapt a pretrained classifier to new data"

    plan: bool = option("print what was read and what would be done; train nothing", False)
    task: TaskSpec = field(default_factory=TaskSpec, metadata=part("data"))
    training: TrainConfig = field(default_factory=TrainConfig, metadata=part("training"))

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        if "resume" not in options:
            return super().parse(options)
        folder = Path(options["resume"])
        changed = sorted(set(options) - FREE_ON_RESUME)
        _refuse([name for name in changed if name not in FILES], folder)
        job = run_options(folder, "--resume", named="model" in options)
        if not job.get("data"):
            raise ValueError(f"{folder / JOB_FILE} is damaged or was changed: it names no data")
        # What was read from a file that has moved may be named where it is now. It is compared.
        _refuse([name for name in changed if not is_gone(job.get(name) or "")], folder)
        check_files("--resume", folder, job | options)
        return super().parse(job | options)

    def __post_init__(self) -> None:
        required(self.task, "model", "data")
        if self.task.folds and (self.training.resume or self.training.save_every):
            raise ValueError("--folds: its runs are not saved, and cannot be resumed")
        budget = self.training.forget_budget
        if budget is None or self.task.source_inputs:
            return
        if not self.task.card or Budget.parse(budget).points:
            raise ValueError(
                "--forget-budget needs --source-inputs to check on, or (for nats) a --card to "
                "forecast by"
            )


def run_options(folder: Path, option: str, *, named: bool) -> dict[str, Any]:
    """The options of the run of `fast finetune` in a folder: see `read_job`."""
    return read_job(folder, option, parser_of(FinetuneSpec), named)


def _refuse(changed: list[str], folder: Path) -> None:
    """Raise ValueError where options of a run that goes on are changed."""
    if changed:
        raise ValueError(
            f"--resume goes on exactly as {folder}/{JOB_FILE} says; drop {flag(changed[0])}, or "
            "start a new run with it"
        )
