"""Does FAST learn faster and forget less? Every method on real pairs, over seeds, as one table.

    python benchmarks/finetune.py --data FOLDER

Finished runs are kept in `benchmarks/results/finetune.jsonl` and not run again. Runs share nothing,
so `--workers` of them go side by side, one thread each.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fast
from finetune_table import table
from pairs import PAIRS, Folder

RESULTS = Path(__file__).parent / "results"
ISSUE_PAIRS = (
    "resnet20 -> sign_digits,resnet20 -> gtsrb,mobilenet 0.25 -> flowers,minilm -> banking77"
)
# FAST at its defaults; every baseline at the better of two learning rates.
LEARNING_RATES = {"fast": (1e-3,)}
BASELINE_RATES = (3e-4, 1e-3)


def run(task: tuple[str, str, float, int, Path]) -> dict[str, Any]:
    """One run; returns its record."""
    pair, spec, lr, seed, data = task
    method, options = parse(spec)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    job = PAIRS[pair].make(Folder(data))
    steps = PAIRS[pair].steps
    result = fast.finetune(
        job.model,
        job.train,
        job.val,
        job.source,
        method=method,
        lr=lr,
        steps=steps,
        seed=seed,
        eval_every=PAIRS[pair].eval_every,
        progress=False,
        **options,
    )
    keys = ("step", "loss", "target_accuracy", "source_accuracy", "drift", "seconds")
    history = [
        {k: round(r[k], 5) if r[k] is not None else None for k in keys} for r in result.history
    ]
    return {
        "pair": pair,
        "method": spec,
        "lr": lr,
        "seed": seed,
        "source_before": result.source_accuracy_before,
        "history": history,
        "commit": commit(),
    }


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Method and options of `method` or `method:option=value:option=value`."""
    method, *settings = spec.split(":")
    pairs = (setting.split("=", 1) for setting in settings)
    return method, {name: ast.literal_eval(value) for name, value in pairs}


def commit() -> str:
    """Short hash of the checkout, with a plus where it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../python", "../fastkernels"])
    return name.stdout.strip() + ("+" if changed.returncode else "")


def machine() -> str:
    return (
        f"{platform.processor() or platform.machine()}, one thread per run; torch "
        f"{torch.__version__}, Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=ISSUE_PAIRS, help="names, separated by commas")
    parser.add_argument(
        "--methods", default="fast,vanilla", help="e.g. fast,fast:distill=0:ramp=0,vanilla"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="finetune", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    RESULTS.mkdir(exist_ok=True)
    store = RESULTS / f"{args.name}.jsonl"
    records = (
        [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    )
    done = {(r["pair"], r["method"], r["lr"], r["seed"]) for r in records}
    tasks = [
        (pair, method, lr, int(seed), args.data.resolve())
        for seed in args.seeds.split(",")
        for pair in args.pairs.split(",")
        for method in args.methods.split(",")
        for lr in LEARNING_RATES.get(parse(method)[0], BASELINE_RATES)
        if (pair, method, lr, int(seed)) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        for record in pool.imap_unordered(run, tasks):
            records.append(record)
            with store.open("a") as f:
                f.write(json.dumps(record) + "\n")
            last = record["history"][-1]
            print(record["pair"], record["method"], record["lr"], record["seed"], last, flush=True)
    names = args.pairs.split(",")
    text = table([r for r in records if r["pair"] in names], machine())
    (RESULTS / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
