"""`fast rewind`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

import fast
from fast.cli.report.table import percent, text_table
from fast.cli.spec import RewindSpec
from fast.cli.spec.task import TaskSpec
from fast.cli.task.data import print_notes, read_data, training_split
from fast.cli.task.prepare import load_network, prepare_splits
from fast.data.source_inputs import LIMIT
from fast.data.sources import DataWarning, NamedData, Split, load_data
from fast.errors import printable
from fast.figures import save
from fast.files import check_writable
from fast.merge.rewind.result import Rewound
from fast.train.engine import pick_device

PICTURE = "rewind.png"


def run(spec: RewindSpec) -> int:
    pick_device(spec.device)
    folder = Path(spec.output or f"runs/{spec.task.short_name}-rewind")
    check_writable(folder, "--output")
    task = spec.named
    notes: list[str] = []
    sets = read_data(task, notes)
    loaded = load_network(task)
    splits = {"source_inputs": _shuffled(sets["source_inputs"])}
    if "data" in sets:
        splits["train"] = _whole(task, sets["data"])
    prepared, _, _ = prepare_splits(task, loaded, splits)
    print_notes(loaded.notes + notes)
    result = fast.rewind(
        loaded.model,
        spec.tuned,
        prepared["source_inputs"],
        spec.budget,
        data=prepared.get("train"),
        source_skill=spec.source_skill,
        seed=spec.seed,
        device=spec.device,
    )
    if "data" in sets:
        result.classes = list(sets["data"].classes)
    result.save(folder)
    files = [str(folder)]
    try:
        save(result.plot(), folder / PICTURE)
        files.append(PICTURE)
    except ImportError as error:
        print_notes([f"no {PICTURE}: {error}"])
    print(_report(result))
    print(f"saved in {', '.join(map(printable, files))}")
    return 0


def _shuffled(data: NamedData) -> Any:
    """Source inputs in random order: folders are sorted by class, and not all samples are used."""
    split = training_split(data)
    return split.subset(np.random.default_rng(0).permutation(len(split))[:LIMIT])


def _whole(task: TaskSpec, data: NamedData) -> Split:
    """All target samples to learn from, none held out: `fast.rewind` does that itself."""
    train, val = data.train, data.val
    if train is None or val is None:
        return training_split(data)
    with warnings.catch_warnings():  # they were shown when it was read
        warnings.simplefilter("ignore", DataWarning)
        columns = {"input_column": task.input_column, "label_column": task.label_column}
        return training_split(load_data(data.name, **columns, numeric_labels=False))


def _report(result: Rewound) -> str:
    """Each place that was looked at, in a line, and what was chosen."""
    budget = result.config.budget
    assert budget is not None

    def loss(lost: float) -> str:
        return f"{100 * lost:.2f} %" if budget.points else f"{lost:.4f}"

    rows = [
        [
            record["stage"],
            f"{record['place']:.3f}",
            loss(record["forecast"]),
            percent(record["target_accuracy"]),
            "<" if record is result.final else "",
        ]
        for record in result.history
    ]
    table = text_table(["stage", "place", "source lost", "target, %", "chosen"], rows)
    return (
        f"{table}\n\nforget budget {budget}: {loss(result.lost)} lost, measured on held-back "
        "source inputs"
    )
