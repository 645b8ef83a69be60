"""Curvature of the source and the target loss of a network: eigenvalues, trace, density, layers.

  fast curvature --checkpoint runs/ResNet-signs-fast
  fast curvature --checkpoint adapted/ --model nets.py:ResNet(20) \\
      --data signs.npz --source cifar10.npz
  fast curvature --model timm:resnet18 --source imagenet-part/

A checkpoint is what `fast finetune --output` or `Result.save` wrote; of the former, model and data
are known. --data is the loss of the target task (head of the checkpoint), --source that of the
source task (head that it had before); a network without a checkpoint has its own task only.
Writes curvature.json and spectrum.png to --output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast.cli.commands import finetune
from fast.cli.options import add_model_and_data, fill_defaults, folder_name, mark_unset, require
from fast.cli.parser import Parser
from fast.cli.record import JOB_FILE, read_record
from fast.cli.report.curvature import figure, text
from fast.files import check_writable

if TYPE_CHECKING:
    from fast.curvature import Summary

KINDS = ("hessian", "ggn")
MOST_TOP = 200
# Of job.json, what says which network on which data.
FROM_JOB = (
    "model", "data", "source", "val_fraction", "input_size", "resize", "interpolation", "mean",
    "std", "skip_broken", "input_column", "label_column", "max_length",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("curvature")
    group.add_argument(
        "--checkpoint", type=folder_name, metavar="FOLDER", help="of an adapted network"
    )
    group.add_argument(
        "--output",
        type=folder_name,
        metavar="FOLDER",
        help="(default: curvature/ in the checkpoint)",
    )
    group.add_argument(
        "--kind", choices=KINDS, default="hessian", help="which matrix (default: hessian)"
    )
    group.add_argument(
        "--params", metavar="REGEX", help="only parameters whose whole name matches (default: all)"
    )
    for flag, default, what in (
        ("--samples", 256, "samples of each task, drawn by --seed; training data where there are"),
        ("--batch-size", 64, "samples per pass: memory"),
        ("--top", 5, "eigenvalues of largest magnitude"),
        ("--trace-products", 48, "matrix-vector products for a trace"),
        ("--probes", 4, "random vectors for the spectral density; 0: none"),
        ("--lanczos-steps", 48, "products for each of them"),
        ("--seed", 0, "of samples and probes"),
    ):
        group.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    group.add_argument("--no-layers", action="store_true", help="leave out the table by layer")
    group.add_argument("--device", metavar="NAME", help="(default: cuda if there is one)")
    group.add_argument(
        "--no-progress", dest="progress", action="store_const", const=False, help="no bars"
    )
    add_model_and_data(parser)
    mark_unset(parser)


def run(args: argparse.Namespace) -> int:
    given = fill_defaults(args)
    if args.checkpoint:
        _fill_from_job(args, Path(args.checkpoint), given)
    require(args, "model")
    _check(args)
    folder = _output(args)

    from fast.cli.curvature_job import losses_of
    from fast.curvature import GGN, Hessian, keep_freed_memory, summarise

    keep_freed_memory()
    kind = {"hessian": Hessian, "ggn": GGN}[args.kind]
    found, methods = {}, {}
    for loss in losses_of(args):
        print(f"{loss.name}: {loss.samples} samples of {loss.data}", file=sys.stderr)
        operator = kind(loss.model, "cross_entropy", loss.batches, args.params, seed=args.seed)
        found[loss.name] = _summary(args, summarise, operator)
        methods[loss.name] = operator.explain()
    _write(folder, args, found, methods)
    print(text(args.kind, found))
    print(f"\n{folder}: curvature.json" + (", spectrum.png" if args.probes else ""))
    return 0


def _summary(args: argparse.Namespace, summarise: Any, operator: Any) -> Summary:
    from fast.curvature import SecondDerivativeError

    try:
        return summarise(
            operator,
            num_top=args.top,
            trace_matvecs=args.trace_products,
            num_probes=args.probes,
            num_lanczos_steps=args.lanczos_steps,
            layers=None if args.no_layers else "layer",
            seed=args.seed,
            progress=args.progress,
        )
    except SecondDerivativeError as error:
        raise ValueError(str(error)) from error


def _check(args: argparse.Namespace) -> None:
    """What is wrong with the numbers, before anything is read."""
    least = {"samples": 1, "batch_size": 1, "top": 1, "trace_products": 6, "probes": 0,
             "lanczos_steps": 1}  # fmt: skip
    for name, bound in least.items():
        if getattr(args, name) < bound:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least {bound}; got {getattr(args, name)}")
    if args.top > MOST_TOP:
        raise ValueError(
            f"--top must be at most {MOST_TOP}; got {args.top}: each is a vector of the size of "
            "the network. --probes gives the density of all"
        )
    if not (args.data or args.source):
        raise ValueError("--source or --data must be given; see --help")
    if args.data and not args.checkpoint:
        raise ValueError(
            "--data is the target task, and needs a --checkpoint with a head for it; the task that "
            "the network itself was trained on goes to --source"
        )
    if args.checkpoint and args.weights:
        raise ValueError("--weights: the checkpoint has the weights; drop one of the two")


def _fill_from_job(args: argparse.Namespace, folder: Path, given: set[str]) -> None:
    """Model and data as `fast finetune` had them, where the command line does not say."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--checkpoint {folder}: no such folder")
    if not (folder / JOB_FILE).is_file():
        return
    parser = Parser()
    finetune.add_arguments(parser)
    saved = read_record(folder, "--checkpoint", parser, "model" in given)
    fill_defaults(saved)
    # Who names data means those, and no others.
    named = args.data or args.source
    for name in FROM_JOB:
        if named and name in ("data", "source"):
            continue
        value = getattr(saved, name)
        if value is not None and name not in given:
            setattr(args, name, value)


def _output(args: argparse.Namespace) -> Path:
    if args.output:
        folder = Path(args.output)
    elif args.checkpoint:
        folder = Path(args.checkpoint) / "curvature"
    else:
        from fast.cli.job import short_name

        named = argparse.Namespace(model=args.model, data=args.source)
        folder = Path("runs") / f"curvature-{short_name(named)}"
    check_writable(folder, "--output")
    return folder


def _write(
    folder: Path, args: argparse.Namespace, found: dict[str, Summary], methods: dict[str, str]
) -> None:
    from fast.analysis import plots
    from fast.cli.commands.env import describe
    from fast.files import atomic_file, write_json

    hidden = ("run", "unset", "parser", "progress")
    options = {k: v for k, v in vars(args).items() if k not in hidden and v is not None}
    losses = {name: s.as_dict() | {"method": methods[name]} for name, s in found.items()}
    write_json(
        folder / "curvature.json", {"options": options, "machine": describe(), "losses": losses}
    )
    if args.probes:
        with atomic_file(folder / "spectrum.png") as temporary:
            plots.save(figure(args.kind, found), temporary)
