"""`--demo`: scikit-learn's digits in place of a model and data, for a try without any file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fast.cli.options import require
from fast.files import check_writable

NAME = "digits"


def add_demo(group: Any) -> None:
    group.add_argument(
        "--demo",
        action="store_true",
        help="digits 0-4, then 5-9, of scikit-learn (offline) in place of --model and --data",
    )


@contextmanager
def job_for(args: argparse.Namespace, command: str, *needed: str) -> Iterator[tuple[Any, Path]]:
    """(job, output folder) of `--demo`, or of the model and data that were named.

    Args:
        needed: options besides model and data that must be given.

    Raises:
        ValueError: of the folder: it cannot be written to.
    """
    if not args.demo:
        require(args, "model", "data", *needed)
        from fast.cli.job import load_job, short_name

        folder = _folder(args, f"runs/{command}-{short_name(args)}")
        yield load_job(args), folder
        return
    own = ("model", "weights", "data", "source", "source_inputs", "card")
    given = [name.replace("_", "-") for name in own if getattr(args, name, None)]
    if given:
        raise ValueError(f"--demo brings its own model and data; drop --{given[0]}")

    import torch

    from fast.cli.commands import demo

    for name, value in (("steps", demo.STEPS), ("eval_every", demo.EVAL_EVERY)):
        if not hasattr(args, name) and not hasattr(args, "epochs"):
            setattr(args, name, value)
    folder = _folder(args, f"runs/{command}-{NAME}")
    threads = torch.get_num_threads()
    torch.set_num_threads(demo.THREADS)
    try:
        yield _job(), folder
    finally:
        torch.set_num_threads(threads)


def _folder(args: argparse.Namespace, default: str) -> Path:
    folder = Path(args.output or default)
    check_writable(folder, "--output")
    return folder


def _job() -> Any:
    from fast.cli.commands import demo
    from fast.cli.job import Job
    from fast.models.load import LoadedModel

    source, target = demo.digits(range(5)), demo.digits(range(5, 10))
    network = demo.pretrain(*source)
    sizes = {"train": len(target[0][1]), "val": len(target[1][1]), "source": len(source[1][1])}
    classes = ("5", "6", "7", "8", "9")
    return Job(LoadedModel(model=network), *target, source[1], classes, NAME, sizes=sizes)
