"""`fast rewind`."""

from __future__ import annotations

from pathlib import Path

import fast
from fast.cli.folders import with_numbers
from fast.cli.job_file import absolute, replace_job
from fast.cli.notes import print_notes
from fast.cli.report.table import percent, text_table
from fast.cli.spec import RewindSpec
from fast.cli.spec.base import shown
from fast.cli.task.data import drawn_inputs, read_data, source_samples
from fast.cli.task.prepare import load_network, prepare_splits
from fast.cli.task.run import check_replaceable
from fast.deploy.labelled import numbered
from fast.errors import printable
from fast.figures import save
from fast.files import check_writable, read_json_if_there
from fast.models.device import pick_device
from fast.models.saved import OPTIONS_FILE
from fast.models.saved.description import classes_beside
from fast.train.rewind.result import REWIND, Rewound, lost_at

PICTURE = "rewind.png"


def run(spec: RewindSpec) -> int:
    pick_device(spec.device)
    new = with_numbers(Path("runs") / f"{spec.task.short_name}-rewind")
    folder = Path(spec.output or next(path for path in new if not path.exists()))
    check_writable(folder, "--output")
    check_replaceable(folder, own=_is_rewound(folder))
    task = spec.named
    sets, notes = read_data(task, hold_out=False)  # `fast.rewind` does that itself
    loaded = load_network(task)
    splits = {"source_inputs": drawn_inputs(sets["source_inputs"])}
    classes = classes_beside(spec.tuned)
    if "data" in sets:
        data = sets["data"]
        splits["train"] = numbered(data.for_training(), data, classes, "target")
        classes = classes or list(data.classes)
    prepared, preparation, _ = prepare_splits(task, loaded, splits)
    print_notes(*loaded.notes, *notes)
    result = fast.rewind(
        loaded.model,
        spec.tuned,
        source_samples(sets["source_inputs"], prepared["source_inputs"]),
        spec.budget,
        data=prepared.get("train"),
        source_skill=spec.source_skill,
        seed=spec.seed,
        device=spec.device,
    )
    result.classes = classes
    result.network, result.preparation = absolute(task.model), preparation
    replace_job(folder, shown(task))
    result.save(folder)
    files = [str(folder)]
    try:
        save(result.plot(), folder / PICTURE)
        files.append(PICTURE)
    except ImportError as error:
        print_notes(f"no {PICTURE}: {error}")
    print(_report(result))
    print(f"saved in {', '.join(map(printable, files))}")
    return 0


def _is_rewound(folder: Path) -> bool:
    return read_json_if_there(folder / OPTIONS_FILE).get("method") == REWIND


def _report(result: Rewound) -> str:
    """A table of the places that were tried, and what the chosen one loses."""
    budget = result.config.budget
    assert budget is not None

    def loss(lost: float) -> str:
        return f"{100 * lost:z.2f} %" if budget.points else f"{lost:z.4f}"

    rows = [
        [
            record["stage"],
            f"{record['place']:.3f}",
            loss(lost_at(record)),
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
