"""Source and target loss over the plane that an adaptation moves in, and how its steps lie.

  fast landscape --methods fast,vanilla \\
      --model nets.py:ResNet(20) --weights resnet20.safetensors \\
      --data signs.npz --source cifar10.npz --steps 150
  fast landscape --demo

Each method runs once, with its weights kept at every evaluation (--eval-every). The figure shows
both losses over the plane, with the paths; the share of each step that lies in the stiffest
directions of the source loss; and the forecast rise of the source loss against the measured one.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from fast.adapt.methods import METHODS
from fast.cli.offline import add_demo, job_for
from fast.cli.options import (
    add_model_and_data,
    add_training,
    check_training,
    folder_name,
    training_options,
)
from fast.cli.report.table import percent, text_table
from fast.cli.runs import check_methods, method_names, runnable, shown_options

NOT_HERE = ("method", "output", "resume", "save_every", "patience")
MATRICES = ("ggn", "hessian")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("landscape")
    group.add_argument(
        "--methods",
        type=method_names,
        default=["fast", "vanilla"],
        metavar="NAME,NAME",
        help=f"of {', '.join(METHODS)} (default: fast,vanilla); the target head of the first "
        "answers all over the plane",
    )
    group.add_argument(
        "--resolution", type=int, default=21, metavar="N", help="of the plane (default: 21)"
    )
    group.add_argument(
        "--samples",
        type=int,
        default=256,
        metavar="N",
        help="of source and of target, for losses and curvature (default: 256)",
    )
    group.add_argument(
        "--stiff", type=int, default=5, metavar="K", help="stiff directions (default: 5)"
    )
    group.add_argument(
        "--matrix",
        choices=MATRICES,
        default="ggn",
        help="of the source loss: ggn (Gauss-Newton) or hessian (default: ggn)",
    )
    group.add_argument(
        "--output", type=folder_name, metavar="FOLDER", help="(default: runs/landscape-MODEL-DATA)"
    )
    add_demo(group)
    add_model_and_data(parser, protection=True)
    add_training(parser, skip=NOT_HERE)


def run(args: argparse.Namespace) -> int:
    check_methods(args.methods)
    for name, least in (("resolution", 3), ("samples", 2), ("stiff", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}; got {getattr(args, name)}")
    check_training(args)
    if getattr(args, "batch_norm", None) == "track":  # said before training, not after
        raise ValueError(
            "--batch-norm track changes the source loss by statistics, not weights: use frozen"
        )
    with job_for(args, "landscape", "source") as (job, folder):
        if job.source is None:
            raise ValueError("--source must be given; see --help")
        paths = [_adapt(args, job, method) for method in runnable(args.methods, job)]

        import fast

        found = fast.landscape(
            paths,
            job.source,
            job.val,
            resolution=args.resolution,
            samples=args.samples,
            num_stiff=args.stiff,
            matrix=args.matrix,
            seed=getattr(args, "seed", 0),
            progress=getattr(args, "progress", None),
        )
    _write(args, job, folder, found)
    return 0


def _adapt(args: argparse.Namespace, job: Any, method: str) -> Any:
    """One run, as a path."""
    import fast

    recorder = fast.PathRecorder(job.source)
    options = {k: v for k, v in training_options(args).items() if k not in NOT_HERE}
    result = fast.finetune(
        copy.deepcopy(job.loaded.model),
        **(job.data | {"source": recorder}),
        **options,
        method=method,
    )
    path = recorder.path(result)
    print(
        f"{method}: {path.steps[-1]} steps, target {percent(result.target_accuracy)} %, source "
        f"{percent(result.source_accuracy_before)} -> {percent(result.source_accuracy)} %"
    )
    return path


def _write(args: argparse.Namespace, job: Any, folder: Path, found: Any) -> None:
    from fast.analysis import plots
    from fast.analysis.landscape.draw import draw
    from fast.cli.commands.env import describe
    from fast.files import atomic_file, write_json

    figure = draw(found, title=job.name)
    with atomic_file(folder / "landscape.png") as temporary:
        plots.save(figure, temporary)
    write_json(
        folder / "landscape.json",
        {
            "options": shown_options(args),
            "machine": describe(),
            **found.to_dict(),
        },
    )
    print("\n" + text_table(*_table(found)))
    print(_notes(found))
    print(f"\n{folder}: landscape.png, landscape.json")


def _table(found: Any) -> tuple[list[str], list[list[str]]]:
    header = ["method", "target", "source", "drift", "in plane", "stiff share"]
    header += ["rise", "forecast", "by card"]
    rows = []
    for path in found.paths:
        share = path.mean_stiff_share
        rows.append(
            [
                path.name,
                percent(path.target_accuracy[-1]),
                percent(path.source_accuracy[-1]),
                f"{path.drift[-1]:.2f}",
                f"{path.in_plane:.0%}",
                "" if share is None else f"{share:.3f}",
                f"{path.rise[-1]:.3g}",
                f"{path.forecast[-1]:.3g}",
                "" if (card := path.card_shown[-1]) is None else f"{card:.3g}",
            ]
        )
    return header, rows


def _notes(found: Any) -> str:
    from fast.analysis.landscape.draw import SMALLEST_RISE, undrawn

    def correlation(kind: str) -> str:
        value = found.correlation(kind)
        return "undefined" if value is None else f"{value:.2f}"

    eigenvalues = ", ".join(f"{v:.3g}" for v in found.eigenvalues)
    short = "" if found.converged else " (not converged)"
    count = undrawn(found)
    left_out = (
        f"\n{count} points are not in the figure of forecasts, whose axes are logarithmic: the "
        f"source loss did not rise there, or was not forecast to, by {SMALLEST_RISE:g} nats."
        if count
        else ""
    )
    return f"""
Accuracies in %, drift ||w - w0||. Rise of the source loss in nats on {
        found.source_samples
    } samples:
measured, by the exact product of the {found.matrix} at w0, by a source card. The card is
calibrated on steps like Adam's first ones: a run that turns, or is held to its source, loses less
than it says, and of a run that went further than those steps it says nothing.
Stiff share: of a step's norm, in the top {len(found.eigenvalues)} eigenvectors of the source
{found.matrix} (a random direction: {found.chance:.4f}); eigenvalues {eigenvalues}{short}.
Correlation of forecast and rise over all steps: {correlation("forecast")} by product, {
        correlation("card_forecast")
    } by card.{left_out}"""
