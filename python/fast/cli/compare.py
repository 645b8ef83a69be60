"""Run several methods on the same job: a table, curves.png and a self-contained report.html.

  fast compare --methods fast,vanilla,l2-sp,lp-ft --seeds 0,1,2 \\
      --model nets.py:ResNet(20) --weights resnet20.safetensors \\
      --data signs.npz --source cifar10.npz --steps 150

Finished runs are kept in --output: the same command goes on where it was interrupted, and one with
more methods or seeds runs only what is new.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from fast.cli.options import (
    add_model_and_data,
    add_training,
    check_training,
    numbers,
    require,
    training_options,
)
from fast.cli.summary import Run, summarise
from fast.cli.table import text_table
from fast.train.config import METHODS

# Given by the comparison itself, or of a single run.
NOT_HERE = ("method", "seed", "lr", "output", "resume", "save_every")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=["fast", "vanilla"],
        metavar="NAME,NAME",
        help=f"of {', '.join(METHODS)} (default: fast,vanilla)",
    )
    group.add_argument("--seeds", type=_integers, default=(0,), metavar="N,N", help="(default: 0)")
    group.add_argument(
        "--lr",
        type=numbers,
        default=(1e-3,),
        metavar="X[,X]",
        help="with several, each method runs at the one best for its target accuracy on the first "
        "seed (default: 0.001)",
    )
    group.add_argument("--output", metavar="FOLDER", help="(default: runs/compare-MODEL-DATA)")
    add_model_and_data(parser)
    add_training(parser, skip=NOT_HERE)


def run(args: argparse.Namespace) -> int:
    require(args, "model", "data")
    unknown = [m for m in args.methods if m not in METHODS]
    if unknown:
        raise ValueError(f"--methods: no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    methods = list(dict.fromkeys(args.methods))
    for lr, seed in itertools.product(args.lr, args.seeds):
        check_training(args, lr=lr, seed=seed)

    from fast.cli.job import load_job, short_name

    job = load_job(args)
    folder = Path(args.output or f"runs/compare-{short_name(args)}")
    runner = Runner(args, job, folder)
    runs = [r for method in methods for r in runner.all_seeds(method)]
    _write(args, job, folder, runs)
    return 0


class Runner:
    """Runs, or reads back, single runs of one comparison; a finished one is a JSON file."""

    def __init__(self, args: argparse.Namespace, job: Any, folder: Path):
        self.args, self.job, self.folder = args, job, folder
        self.options = training_options(args)
        self.options = {k: v for k, v in self.options.items() if k not in NOT_HERE}
        self.key = fingerprint(args, self.options)

    def all_seeds(self, method: str) -> list[Run]:
        seeds, lrs = self.args.seeds, self.args.lr
        first = [self.one(method, seeds[0], lr) for lr in lrs]
        best = max(first, key=lambda r: (r.target_accuracy, r.source_accuracy or 0))
        return [best] + [self.one(method, seed, best.lr) for seed in seeds[1:]]

    def one(self, method: str, seed: int, lr: float) -> Run:
        from fast.files import write_json

        file = self.folder / "runs" / f"{method}-lr{lr:g}-seed{seed}.json"
        kept = read_run(file, self.key)
        if kept is not None:
            print(f"{kept} (kept from before)")
            return kept

        import fast

        start = time.monotonic()
        result = fast.finetune(
            copy.deepcopy(self.job.loaded.model),
            **self.job.data,
            **self.options,
            method=method,
            seed=seed,
            lr=lr,
        )
        done = Run.of(result, time.monotonic() - start)
        write_json(file, {"key": self.key, **vars(done)})
        print(f"{done} ({done.seconds:.0f} s)")
        return done


def read_run(file: Path, key: str) -> Run | None:
    """A finished run of the same job; None where there is none, or the job has changed."""
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to run it again") from error
    return Run(**saved) if saved.pop("key", None) == key else None


def fingerprint(args: argparse.Namespace, options: dict[str, Any]) -> str:
    """Hash of all that decides a run: model, data (by name, size and time of every file), options.

    A data set on the hub is taken to stay as it is.
    """
    import fast

    parts: list[Any] = [fast.__version__, sorted(options.items())]
    for name in ("model", "weights", "data", "source", "val_fraction", "input_size", "mean", "std"):
        parts.append((name, getattr(args, name)))
    parts += [args.flip, args.input_column, args.label_column, args.max_length]
    for name in (args.weights, args.data, args.source, (args.model or "").split(":")[0]):
        parts.append([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(name)])
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _files(name: str | None) -> list[Path]:
    """The file called `name`, or all files below that folder (links to folders are followed)."""
    path = Path(name or "").expanduser()
    if not name or not path.is_dir():
        return [path] if name and path.exists() else []
    found = [
        Path(root, file) for root, _, files in os.walk(path, followlinks=True) for file in files
    ]
    return sorted(file for file in found if file.exists())  # a dangling link is no file


def _write(args: argparse.Namespace, job: Any, folder: Path, runs: list[Run]) -> None:
    from fast.cli.env import describe
    from fast.cli.report import save_curves, write_report
    from fast.files import write_json

    header, rows = summarise(runs)
    title = f"{job.name}: {len(runs)} runs"
    save_curves(runs, job.name, folder / "curves.png")
    options = {k: v for k, v in vars(args).items() if k != "run" and v is not None}
    machine = describe()
    write_json(
        folder / "results.json",
        {
            "options": options,
            "samples": job.sizes,
            "machine": machine,
            "summary": [dict(zip(header, row, strict=True)) for row in rows],
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


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"whole numbers separated by commas, not {text!r}"
        ) from None
