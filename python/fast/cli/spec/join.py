"""The options of `fast join`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from fast.cli.job_file import check_files
from fast.cli.options import option, part
from fast.cli.spec.base import SAVED, Spec, required
from fast.cli.spec.finetune import run_options
from fast.cli.spec.task import TaskSpec
from fast.cli.values import folder_name

# Options of a run that play no part in joining.
LEFT_OUT = ("source", "card", "flip", "augment", "folds")


@dataclass(frozen=True, kw_only=True)
class JoinSpec(Spec):
    """One network for the old and the new classes of a finished run, with one softmax.

      fast join runs/resnet18-photos-fast --source-inputs old/ --output joined/

    The heads are brought to one scale on the source inputs, and on the samples that the run held
    out. Network and data are those of the run. The folder --output then holds model.safetensors,
    join.json (the names of the classes, and how the heads were scaled) and result.json.
    """

    about = "one softmax over the old and the new classes of a run"
    package = SAVED

    run: str = option(
        "folder of a run of fast finetune", "", words=None, metavar="RUN", read=folder_name
    )
    output: str = option("folder to write to", "", read=folder_name, metavar="FOLDER")
    source_classes: str | None = option(
        "names of the old classes, one a line, in the order of the network's own head (default: "
        "what the network says, or numbers); a name that both tasks have becomes one class",
        metavar="FILE",
    )
    source_labelled: bool = option(
        "use the labels of the source inputs (default: the network's own answers)", False
    )
    task: TaskSpec = field(default_factory=TaskSpec, metadata=part("data", LEFT_OUT))

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """Network and data are those of the run, where the command line does not say."""
        folder = Path(options["run"])
        job = run_options(folder, "RUN", named="model" in options)
        names = {f.name for f in fields(TaskSpec)} - set(LEFT_OUT)
        all_options = {k: v for k, v in job.items() if k in names} | options
        check_files("RUN", folder, all_options)
        return super().parse(all_options)

    def __post_init__(self) -> None:
        required(self, "output")
        if not self.task.source_inputs:
            raise ValueError(
                "--source-inputs must be given (the run had none): a few hundred inputs of the old "
                "task"
            )
