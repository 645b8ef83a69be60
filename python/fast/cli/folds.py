"""Cross-validation of one run: `fast finetune --folds`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

from fast.cli.report.results import write_results
from fast.cli.report.summary import Run
from fast.cli.report.table import percent, text_table
from fast.cli.spec import FinetuneSpec
from fast.cli.task.load import LoadedTask
from fast.cli.task.prepare import labels_of
from fast.data.sources import fold_rows
from fast.errors import printable
from fast.files import check_writable
from fast.ranks import Ranks

FOLDS_FILE = "folds.json"


def cross_validate(spec: FinetuneSpec, task: LoadedTask, ranks: Ranks) -> None:
    """For each part, train on the others and measure on it; print and save the accuracies.

    Raises:
        ValueError: there are fewer samples than parts, or the folder has results already.
        FloatingPointError: a run diverged.
    """
    folds, config = spec.task.folds, spec.training
    assert folds is not None
    folder = Path(config.output or f"runs/{spec.task.short_name}-{config.method}-folds")
    with ranks.together():
        if ranks.first:
            check_writable(folder, "--output")
            if (folder / FOLDS_FILE).exists():
                raise ValueError(
                    f"--output {folder}: has a {FOLDS_FILE} already; name another folder"
                )
    runs: list[Run] = []
    for i, rows in enumerate(fold_rows(labels_of(task.train), folds), 1):
        start = time.monotonic()
        result = task.fold(rows).adapt(dataclasses.replace(config, output=None))
        runs.append(Run.of(result, time.monotonic() - start, f"fold {i} of {folds}"))
        print(f"{runs[-1]} ({runs[-1].seconds:.0f} s)")
    names = ("target_accuracy", "source_accuracy")
    values = {name: [getattr(run, name) for run in runs] for name in names}
    spread = {
        name: {"mean": statistics.mean(accuracies), "std": statistics.stdev(accuracies)}
        for name, accuracies in values.items()
        if None not in accuracies
    }
    if ranks.first:
        records = [vars(run) for run in runs]
        write_results(folder / FOLDS_FILE, spec, samples=task.sizes, spread=spread, runs=records)
    rows_of_table = [
        [name.removesuffix("_accuracy"), percent(over_folds["mean"]), percent(over_folds["std"])]
        for name, over_folds in spread.items()
    ]
    print("\n" + text_table([f"accuracy over {folds} folds, %", "mean", "std"], rows_of_table))
    print(
        f"saved in {printable(folder / FOLDS_FILE)}; --val-fraction 0 in place of --folds trains a "
        "network on all"
    )
