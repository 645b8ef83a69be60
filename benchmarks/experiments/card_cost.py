"""What a source card and a forgetting budget cost: bytes, and shares of the time of a run.

    python -m benchmarks.experiments.card_cost --data FOLDER

One run of `ewc` per pair with source inputs and a budget: it makes a card, checks, and lands. Time
is that of the process, one thread, so other work on the machine hardly shows.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fast
from benchmarks.common import Record, arguments, commit, machine, save, shown, table
from benchmarks.real_pairs import README_PAIRS, real_pair
from fast.adapt import source
from fast.adapt.guards.budget import ForgettingBudget


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Process seconds of what a run does for the source, by part."""
    spent: dict[str, float] = defaultdict(float)

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                spent[part] += time.process_time() - start

        return run

    places = [
        (source, "own_card", "card"),
        (source, "hold_back", "checks"),
        (ForgettingBudget, "after_step", "checks"),
        (ForgettingBudget, "finish", "checks"),
    ]
    kept = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, part in places:
        setattr(place, name, clocked(part, getattr(place, name)))
    try:
        yield spent
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def measure(name: str, data: Path) -> Record:
    """A row of the table."""
    real = real_pair(name, data)
    # This estimate warms up, too.
    card = fast.SourceCard.estimate(real.model, real.source_inputs, num_samples=64)
    weights = sum(entry.codes.numel() for entry in card.entries.values())
    with TemporaryDirectory() as folder:
        size = card.save(Path(folder) / "card.safetensors").stat().st_size / weights
    start = time.process_time()
    with timed() as spent:
        fast.finetune(
            real.model,
            real.train,
            method="ewc",
            steps=real.steps,
            eval_every=real.steps,
            forget_budget=0.1,
            source_inputs=real.source_inputs,
            progress=False,
        )
    training = time.process_time() - start - spent["card"] - spent["checks"]
    return {
        "pair": name,
        "backbone weights": f"{weights:,}",
        "file, bytes per weight": f"{size:.3f}",
        "steps of 64": real.steps,
        "training, s": f"{training:.1f}",
        "card": f"{100 * spent['card'] / training:.1f} %",
        "all checks of a budget": f"{100 * spent['checks'] / training:.1f} %",
    }


def main() -> None:
    args = arguments(__doc__, README_PAIRS).parse_args()
    torch.set_num_threads(1)
    rows = (measure(name, args.data.resolve()) for name in args.pairs.split(","))
    note = f"Shares of the time of training. {machine()}. Commit {commit()}."
    save("card_cost", [*table(shown(rows)), "", note])


if __name__ == "__main__":
    main()
