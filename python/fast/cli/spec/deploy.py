"""The options of the commands that use a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from fast.cli.options import option
from fast.cli.spec.base import SAVED, Spec, at_least, device_option, required
from fast.cli.values import folder_name
from fast.deploy.words import ExportFormat, Task


@dataclass(frozen=True, kw_only=True)
class RunSpec(Spec):
    """A finished run, and its network."""

    package = SAVED

    run: str = option(
        "folder of a run: of fast finetune, or of result.save", "", words=None, metavar="RUN",
        read=folder_name,
    )  # fmt: skip
    model: str | None = option(
        "network of the run, if its folder names none that may be run: path/file.py:Factory(args)",
        metavar="SPEC",
    )
    device: str | None = device_option()


@dataclass(frozen=True, kw_only=True)
class PredictSpec(RunSpec):
    """Predict the classes of pictures, sounds or texts, with probabilities.

      fast predict runs/resnet18-photos-fast holiday.jpg more/
      fast predict runs/resnet18-photos-fast new/ --task source --csv out.csv
      fast predict runs/minilm-reviews-fast reviews.csv --column text
      fast predict joined/ new/         (of fast join: old and new classes together)

    Inputs go through the pipeline of the run. A path is a file, a folder (all pictures or sounds in
    it), or a table (.csv, .tsv, .parquet) with a column of paths or texts; for a network of texts
    also a file with one text a line, or a folder of files of one text each.
    """

    about = "classes with probabilities for files, folders and tables"

    paths: tuple[str, ...] = option(
        "files, folders, or tables", (), words="+", metavar="PATH", read=str
    )
    task: Task | None = option(
        "classes of the new task (target), of the old one (source), or of both, which needs a "
        "joined network (default: both for a joined network, else target)", choices=get_args(Task),
    )  # fmt: skip
    top: int = option("how many classes are shown for each input", 1)
    csv: str | None = option("write all probabilities to this file", metavar="FILE")
    column: str | None = option(
        "column of a table that holds the inputs (default: one with a usual name)"
    )
    skip_broken: bool = option("leave out files that cannot be read, and say so", False)

    def __post_init__(self) -> None:
        at_least(self, "top", 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(RunSpec):
    """Measure a run on labelled data: accuracy by class, confusion, calibration.

      fast evaluate runs/resnet18-photos-fast labelled/
      fast evaluate runs/resnet18-photos-fast imagenet-val/ --task source

    DATA are as --data and --source of fast finetune. Without DATA, or with the data of the run, its
    own held-out samples are used. The folder --output then holds report.html, confusion.png and
    evaluation.json.
    """

    about = "accuracy, confusion and calibration on labelled data"

    data: str | None = option(
        "labelled data (default: what the run held out)", words="?", metavar="DATA"
    )
    task: Task | None = option(
        "task whose labels these are (default: both for a joined network, else target)",
        choices=get_args(Task),
    )
    skip_broken: bool = option("leave out files that cannot be read", False)
    worst: int = option("how many wrong answers the report shows", 24)
    input_column: str | None = option("column of inputs in a table or a Hugging Face data set")
    label_column: str | None = option("column of labels")
    output: str | None = option(
        "folder of the report (default: RUN/evaluation-TASK; -2, ... for other data)",
        read=folder_name,
    )


@dataclass(frozen=True, kw_only=True)
class ExportSpec(RunSpec):
    """Write the network of a run for use without this library.

      fast export runs/resnet18-photos-fast --format onnx -o served/

    Formats: onnx (compared in onnxruntime), torch.export, safetensors (the plain architecture), hf
    (networks of transformers), timm (those of timm). preprocessing.json and README.md beside it say
    what inputs go through.
    """

    about = "write the network of a run as ONNX, torch.export, Hugging Face"

    format: ExportFormat = option("what to write", "onnx", choices=get_args(ExportFormat))
    output: str = option("folder to write to", "", read=folder_name, metavar="FOLDER")

    def __post_init__(self) -> None:
        required(self, "output")
