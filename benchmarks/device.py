"""Everything that is measured and checked on a GPU, in five minutes: to be run when there is one.

    python -m benchmarks.device --output FOLDER [--parts update op ...] [--minutes 5] [--dry-run]

Each part is a process of its own with a share of the time: one that fails or runs out of it stops
none of the others, and leaves what it has written. `summary.json` in FOLDER says how each ended;
its output and its results are beside it. `--dry-run` goes the same way on the CPU, with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import Record

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("adamw", "whole fp32", "whole bf16", "whole 8-bit", "whole bf16 exact")
PEERS = ("fast", "vmap(jvp(grad))", "compiled vmap(jvp(grad))", "vmap(jvp, vjp)", "curvlinops")
# What compute-sanitizer has time for: ragged ends, skipped steps, unaligned and guarded memory.
SANITIZED = "unaligned or found_inf or past_the_end or (product_and_form and float32)"
SMALL = ("vit_s", "resnet50", "bert_base", "vit_b")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command, and the minutes of five that it may take.

    Attributes:
        dry: the arguments of a dry run in place of those of `command`, where they differ.
        needs: a program without which the part is left out.
    """

    command: tuple[str, ...]
    minutes: float
    dry: tuple[str, ...] = ()
    needs: str = ""
    environment: tuple[tuple[str, str], ...] = ()


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def torchrun(number: int, *arguments: str) -> tuple[str, ...]:
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m")
    return module(*launcher, "benchmarks.device_ranks", *arguments)


def parts(folder: Path) -> dict[str, Part]:
    """Every part by its name, the most important first."""

    def update(*arguments: str) -> tuple[str, ...]:
        name = "benchmarks.kernels.gpu_update"
        return module(name, "--output", str(folder / "update.json"), *arguments)

    def curvature(name: str, *arguments: str) -> tuple[str, ...]:
        output = str(folder / f"{name}.json")
        return module("benchmarks.curvature.gpu_hvp", "--output", output, *arguments)

    def products(name: str, *arguments: str) -> tuple[str, ...]:
        chosen = ("--methods", *PEERS, "--cases", *SMALL, "--no-op", "--rounds", "3")
        return curvature(name, *chosen, *arguments)

    compiled = ("--cases", "vit_s", "--compiled", "vit_s", "--methods", PEERS[2])
    built = ("setup.py", "build_ext", "--inplace")
    tests = module("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels")
    sets = ("--sets", "one_25m", "bert_base", "--variants", *VARIANTS, "--rounds", "20")
    return {
        "build": Part(
            command=(sys.executable, *built), minutes=1.5, needs="nvcc",
            dry=(sys.executable, "setup.py", "--version"), environment=(("FAST_CUDA", "1"),),
        ),
        "update": Part(command=update(*sets), dry=update("--dry-run", *sets), minutes=1.2),
        "op": Part(
            command=curvature("op", "--cases"), dry=curvature("op", "--cases", "--dry-run"),
            minutes=0.4,
        ),
        "tests": Part(command=tests, dry=(*tests, "--collect-only"), minutes=0.6),
        "products": Part(
            command=products("products", "--compiled"),
            dry=products("products", "--compiled", "--dry-run"), minutes=1.6,
        ),
        "tf32": Part(
            command=products("tf32", "--tf32", "--compiled"),
            dry=products("tf32", "--tf32", "--compiled", "--dry-run"), minutes=0.7,
        ),
        "ranks": Part(command=torchrun(1), dry=torchrun(1), minutes=0.3),
        "shard": Part(command=torchrun(1, "--shard"), dry=torchrun(1, "--shard"), minutes=0.3),
        "sanitizer": Part(
            command=("compute-sanitizer", *tests, "-k", SANITIZED), minutes=0.7,
            dry=(*tests, "--collect-only", "-k", SANITIZED), needs="compute-sanitizer",
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        ),
        # Last: compiling a deep network takes minutes.
        "compiled": Part(
            command=products("compiled", *compiled), minutes=0.8,
            dry=products("compiled", *compiled, "--dry-run"),
        ),
    }  # fmt: skip


def run(name: str, part: Part, folder: Path, limit: float, dry_run: bool) -> Record:
    """How a part ended; what it printed is in FOLDER/NAME.log."""
    if part.needs and not dry_run and not shutil.which(part.needs):
        return {"part": name, "ended": f"left out: {part.needs} is not on PATH", "seconds": 0.0}
    command = part.dry if dry_run and part.dry else part.command
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | dict(part.environment)
    if dry_run:
        # Compiling for the CPU takes minutes, and says nothing of a GPU.
        environment |= {"FAST_DEVICE": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    begin = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            ended = f"code {process.wait(timeout=limit)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a part may have started others
            process.wait()
            ended = f"stopped after {limit:.0f} s"
    return {"part": name, "ended": ended, "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=parts(Path()), default=list(parts(Path())))
    parser.add_argument("--minutes", type=float, default=5.0, help="for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --dry-run needs none")
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: part for name, part in parts(folder).items() if name in args.parts}
    deadline = time.monotonic() + 60 * args.minutes
    summary = []
    for name, part in chosen.items():
        # A part may take its share of what is left: others have left some, or had none to leave.
        names = list(chosen)
        after = sum(chosen[other].minutes for other in names[names.index(name) :])
        limit = max(1.0, (deadline - time.monotonic()) * part.minutes / after)
        summary.append(run(name, part, folder, limit, args.dry_run))
        print(summary[-1], flush=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if any(row["ended"] != "code 0" for row in summary):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
