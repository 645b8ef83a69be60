"""What a source card and a forgetting budget cost: bytes, and shares of the time of a run.

    python benchmarks/card_cost.py --data FOLDER

One run of `ewc` per pair with source inputs and a budget: it makes a card, checks, and lands. Time
is that of the process, one thread, so other work on the machine hardly shows.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fast
from benchmarks.common import RESULTS, commit, machine
from benchmarks.finetune.retention import ISSUE_PAIRS
from benchmarks.real_pairs import PAIRS, Folder
from fast.adapt.guards.protect import Protection
from fast.train import trainer


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Process seconds of what a run does for the source, by part."""
    spent: dict[str, float] = defaultdict(float)

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args)
            finally:
                spent[part] += time.process_time() - start

        return run

    places = [(trainer, "make_card", "card"), (trainer, "hold_back", "checks")]
    places.append((Protection, "after_step", "checks"))
    kept = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, part in places:
        setattr(place, name, clocked(part, getattr(place, name)))
    try:
        yield spent
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def measure(name: str, data: Path) -> str:
    """A row of the table."""
    pair = PAIRS[name]
    job = pair.make(Folder(data))
    card = fast.SourceCard.estimate(job.model, job.source_inputs, num_samples=64)  # and a warm-up
    weights = sum(entry.codes.numel() for entry in card.entries.values())
    with TemporaryDirectory() as folder:
        size = card.save(Path(folder) / "card.safetensors").stat().st_size / weights
    start = time.process_time()
    with timed() as spent:
        fast.finetune(
            job.model,
            job.train,
            method="ewc",
            steps=pair.steps,
            eval_every=pair.steps,
            forget_budget=0.1,
            source_inputs=job.source_inputs,
            progress=False,
        )
    total = time.process_time() - start
    training = total - spent["card"] - spent["checks"]
    shares = " | ".join(f"{100 * spent[part] / training:.1f} %" for part in ("card", "checks"))
    return f"| {name} | {weights:,} | {size:.3f} | {pair.steps} | {training:.1f} | {shares} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=ISSUE_PAIRS, help="names, separated by commas")
    args = parser.parse_args()

    torch.set_num_threads(1)
    lines = [
        "| pair | backbone weights | file, bytes per weight | steps of 64 | training, s | card "
        "| all checks of a budget |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in args.pairs.split(","):
        lines.append(measure(name, args.data.resolve()))
        print(lines[-1], flush=True)
    lines += ["", f"Shares of the time of training. {machine()}. Commit {commit()}."]
    (RESULTS / "card_cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
