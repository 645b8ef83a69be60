"""The trade-off curve of a method, target against source accuracy, over the strength of its pull.

  fast retention --methods fast,l2-sp --strengths 0,0.3,1,3,10 --seeds 0,1,2 \\
      --model nets.py:ResNet(20) --weights resnet20.safetensors \\
      --data signs.npz --source cifar10.npz --steps 150

Strength 1 is the method as it is; others multiply what it holds the source with: its pull towards
the pretrained weights, its distillation and its rehearsal of source inputs. With --budgets the
curve is drawn over forget_budget. A method that holds nothing (vanilla, lp-ft, replay) is one
point. Finished runs are kept in --output: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast.adapt.config import Budget
from fast.adapt.methods import METHODS
from fast.adapt.plan import plan_for, rehearsed_by, steps_for, uses_card
from fast.cli.offline import add_demo, job_for
from fast.cli.options import (
    add_model_and_data,
    add_training,
    check_training,
    folder_name,
    numbers,
    training_options,
)
from fast.cli.report.summary import Run, intervals, spread
from fast.cli.report.table import text_table
from fast.cli.runs import (
    NOT_HERE,
    Runner,
    check_methods,
    method_names,
    note_replaced,
    runnable,
    shown_options,
    whole_numbers,
)
from fast.heads import has_batch_norm
from fast.train.config import TrainConfig

STRENGTHS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
SWEPT = ("anchor_decay", "distill", "rehearse", "forget_budget")


@dataclass(frozen=True)
class Setting:
    """One point of a curve: its label, name in files, and options of `fast.finetune`."""

    label: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--methods",
        type=method_names,
        default=["fast"],
        metavar="NAME,NAME",
        help=f"of {', '.join(METHODS)} (default: fast)",
    )
    group.add_argument(
        "--strengths",
        type=numbers,
        metavar="X,X",
        help=f"of the pull (default: {','.join(f'{s:g}' for s in STRENGTHS)})",
    )
    group.add_argument(
        "--budgets",
        type=_budgets,
        metavar="X,X",
        help="sweep forget_budget in place of the strength: nats (0.1) or points (2%%)",
    )
    group.add_argument(
        "--seeds", type=whole_numbers, default=(0,), metavar="N,N", help="(default: 0)"
    )
    group.add_argument(
        "--lr",
        type=numbers,
        default=(None,),
        metavar="X[,X]",
        help="with several, each point is taken at the one best for its target accuracy on the "
        "first seed (default: the method's own)",
    )
    group.add_argument(
        "--output", type=folder_name, metavar="FOLDER", help="(default: runs/retention-MODEL-DATA)"
    )
    add_demo(group)
    add_model_and_data(parser, protection=True)
    add_training(parser, skip=(*NOT_HERE, *SWEPT))


def run(args: argparse.Namespace) -> int:
    check_methods(args.methods)
    if args.strengths and args.budgets:
        raise ValueError("give --strengths or --budgets, not both")
    if any(not 0 <= s < float("inf") for s in args.strengths or ()):
        raise ValueError(f"--strengths must be 0 or more; got {min(args.strengths):g}")
    with job_for(args, "retention", "source") as (job, folder):
        for lr, seed in itertools.product(args.lr, args.seeds):
            check_training(args, lr=lr, seed=seed)
        methods = runnable(args.methods, job)
        norms = has_batch_norm(job.loaded.model)
        plan = {method: settings(method, args, job.data, norms) for method in methods}
        note_replaced(folder / "retention.json", args)
        runner = Runner(args, job, folder)
        curves = [
            (setting, runner.all_seeds(method, setting.name, setting.options))
            for method, chosen in plan.items()
            for setting in chosen
        ]
    _write(args, job, folder, curves)
    return 0


def settings(
    method: str, args: argparse.Namespace, data: dict[str, Any], batch_norms: bool
) -> list[Setting]:
    """The points of one method's curve, weakest first; `batch_norms`: the network has some."""
    given = {k: v for k, v in training_options(args).items() if k not in NOT_HERE}
    config = TrainConfig(**given, method=method)
    informed = uses_card(config, "card" in data, "source_inputs" in data)
    rehearsed = rehearsed_by(config, "source_inputs" in data)
    plan = plan_for(
        config,
        steps=_steps(config, data),
        weighted=informed,
        head_is_last=True,
        rehearsed=rehearsed,
        batch_norms=batch_norms,
    )
    own = {"anchor_decay": plan.anchor_decay, "distill": plan.distill, "rehearse": plan.rehearse}
    held = {name: value for name, value in own.items() if value}
    if not held:
        return [Setting("")]
    if args.budgets:
        ordered = sorted(args.budgets, key=lambda b: -Budget.parse(b).amount)
        return [Setting(b, f"budget{b.replace('%', 'p')}", {"forget_budget": b}) for b in ordered]
    found = []
    for strength in sorted(dict.fromkeys(args.strengths or STRENGTHS)):
        options: dict[str, Any] = {name: strength * value for name, value in held.items()}
        if rehearsed and not strength:
            # What rehearses has another rate, ramp and batch norm: they stay.
            options |= {"lr": plan.lr, "ramp": plan.ramp, "batch_norm": plan.batch_norm}
        found.append(Setting(f"{strength:g}", f"strength{strength:g}", options))
    return found


def _steps(config: TrainConfig, data: dict[str, Any]) -> int:
    """Length of a run."""
    from fast.data.dataset import as_data
    from fast.data.stream import TrainBatches

    if config.steps is not None:
        return config.steps
    return steps_for(
        config, TrainBatches(as_data(data["train"], "train"), config.batch_size, config.seed)
    )


def _write(
    args: argparse.Namespace,
    job: Any,
    folder: Path,
    curves: list[tuple[Setting, list[Run]]],
) -> None:
    from fast.analysis import plots
    from fast.cli.commands.env import describe
    from fast.files import atomic_file, write_json

    before = curves[0][1][0].source_accuracy_before or 0.0
    points: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for setting, seeds in curves:
        (row,) = intervals(seeds)
        points.append({**row, "label": setting.label, **setting.options, "lr": seeds[0].lr})
        after = [r.source_accuracy for r in seeds if r.source_accuracy is not None]
        target = spread([r.target_accuracy for r in seeds])
        lost = spread([before - a for a in after])
        rows.append([seeds[0].method, setting.label, target, spread(after), lost])
    header = ["method", "budget" if args.budgets else "strength", "target", "source", "lost"]

    figure = plots.retention(points, title=job.name, source_before=before)
    with atomic_file(folder / "retention.png") as temporary:
        plots.save(figure, temporary)
    with atomic_file(folder / "retention.csv") as temporary:
        temporary.write_text(_csv(points))
    write_json(
        folder / "retention.json",
        {
            "options": shown_options(args),
            "samples": job.sizes,
            "machine": describe(),
            "source_accuracy_before": before,
            "points": points,
        },
    )
    print("\n" + text_table(header, rows, left=2))
    print(
        f"\nAccuracies in %, mean over seeds ± half of the 95 % interval; source before: "
        f"{100 * before:.1f}\n{folder}: retention.png, retention.csv, retention.json"
    )


def _csv(points: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for p in points for k in p)))
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue()


def _budgets(text: str) -> list[str]:
    try:
        return [str(part) for part in text.split(",") if Budget.parse(part)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
