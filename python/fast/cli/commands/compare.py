"""Run several methods on the same job: a table, curves.png and a self-contained report.html.

  fast compare --methods fast,vanilla,l2-sp,lp-ft --seeds 0,1,2 \\
      --model nets.py:ResNet(20) --weights resnet20.safetensors \\
      --data signs.npz --source cifar10.npz --steps 150
  fast compare --demo --methods all --seeds 0,1,2

Finished runs are kept in --output: the same command goes on where it was interrupted, and one with
more methods or seeds runs only what is new.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from fast.adapt.methods import METHODS
from fast.cli.offline import add_demo, job_for
from fast.cli.options import (
    add_model_and_data,
    add_training,
    check_training,
    folder_name,
    numbers,
)
from fast.cli.report.summary import Run, intervals, summarise
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods",
        type=method_names,
        default=["fast", "vanilla"],
        metavar="NAME,NAME",
        help=f"of {', '.join(METHODS)}, or all (default: fast,vanilla)",
    )
    group.add_argument(
        "--seeds", type=whole_numbers, default=(0,), metavar="N,N", help="(default: 0)"
    )
    group.add_argument(
        "--lr",
        type=numbers,
        default=(None,),
        metavar="X[,X]",
        help="with several, each method runs at the one best for its target accuracy on the first "
        "seed (default: the method's own)",
    )
    group.add_argument(
        "--output", type=folder_name, metavar="FOLDER", help="(default: runs/compare-MODEL-DATA)"
    )
    add_demo(group)
    add_model_and_data(parser, protection=True)
    add_training(parser, skip=NOT_HERE)


def run(args: argparse.Namespace) -> int:
    check_methods(args.methods)
    for lr, seed in itertools.product(args.lr, args.seeds):
        check_training(args, lr=lr, seed=seed)
    with job_for(args, "compare") as (job, folder):
        note_replaced(folder / "results.json", args)
        runner = Runner(args, job, folder)
        runs = [r for method in runnable(args.methods, job) for r in runner.all_seeds(method)]
    _write(args, job, folder, runs)
    return 0


def _write(args: argparse.Namespace, job: Any, folder: Path, runs: list[Run]) -> None:
    from fast.cli.commands.env import describe
    from fast.cli.report.html import save_curves, write_report
    from fast.files import write_json

    header, rows = summarise(runs)
    title = f"{job.name}: {len(runs)} runs"
    save_curves(runs, job.name, folder / "curves.png")
    options = shown_options(args)
    machine = describe()
    write_json(
        folder / "results.json",
        {
            "options": options,
            "samples": job.sizes,
            "machine": machine,
            "summary": [dict(zip(header, row, strict=True)) for row in rows],
            "intervals": intervals(runs),
            "runs": [vars(r) for r in runs],
        },
    )
    write_report(
        folder / "report.html",
        title=title,
        table=(header, rows),
        figure=(folder / "curves.png").read_bytes(),
        options=options,
        machine=machine,
    )
    print("\n" + text_table(header, rows))
    print(f"\n{folder}: curves.png, report.html, results.json")
