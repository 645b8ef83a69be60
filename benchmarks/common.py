"""What the scripts share: arguments, tables, finished runs, and whose figures they are."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def arguments(doc: str | None, pairs: str) -> argparse.ArgumentParser:
    """A parser with --data and --pairs, which are `pairs` by default."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder: real_pairs.py")
    parser.add_argument("--pairs", default=pairs, help="names, separated by commas")
    return parser


def complete(
    name: str,
    run: Callable[..., Record],
    settings: Iterable[Record],
    workers: int = 1,
    **options: Any,
) -> list[Record]:
    """The records of `results/NAME.jsonl`, after those that it lacks were added.

    A record is its setting, what `run(**setting, **options)` returned, and the commit. Runs share
    nothing, so `workers` of them go side by side, on one thread each.
    """
    store = RESULTS / f"{name}.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    records = [json.loads(line) for line in lines]
    missing = [s for s in settings if not any(s.items() <= r.items() for r in records)]
    if not missing:
        return records
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for record in pool.imap_unordered(partial(_finished, run, options), missing):
            records.append(record)
            with store.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(record, flush=True)
    return records


def _finished(run: Callable[..., Record], options: Record, setting: Record) -> Record:
    torch.set_num_threads(1)
    # The first optimizer of a process loads torch's compiler for seconds, which no run is charged.
    torch.optim.SGD([torch.zeros(1)], lr=0.1)
    return setting | run(**setting, **options) | {"commit": commit()}


def table(rows: Iterable[Record]) -> list[str]:
    """Lines of a Markdown table, whose columns are named by the keys of the rows."""
    rows = list(rows)
    if not rows:
        return []
    return [row(rows[0]), row(["---"] * len(rows[0])), *(row(r.values()) for r in rows)]


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def shown(rows: Iterable[Record]) -> Iterator[Record]:
    """The rows, each printed as it comes."""
    for cells in rows:
        print(row(cells.values()), flush=True)
        yield cells


def save(name: str, lines: Iterable[str]) -> None:
    """Print `lines` and keep them as `results/NAME.md`."""
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def learned_and_lost(record: Record) -> str:
    """Target accuracy in per cent, and points of source accuracy lost."""
    lost = record["source_before"] - record["source"]
    return f"{100 * record['target']:.1f}, {100 * lost:.1f}"


def cell(records: Iterable[Record], **setting: object) -> str:
    """`learned_and_lost` of the first record that has this setting; a dash where none has."""
    runs = (learned_and_lost(r) for r in records if setting.items() <= r.items())
    return next(runs, "-")


def save_learned_and_lost(
    name: str, doc: str | None, rows: Iterable[Record], records: Iterable[Record]
) -> None:
    """Keep a table whose cells are `learned_and_lost`, between what the script says of itself and
    whose figures they are."""
    note = "Target accuracy in per cent, and points of source lost."
    end = f"Commit {commits(records)}; {machine()}."
    save(name, [doc or "", "", *table(rows), "", note, "", end])


def commits(records: Iterable[Record]) -> str:
    return ", ".join(sorted({r["commit"] for r in records}))


def commit() -> str:
    """Short hash of the checkout, with a plus where the code has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    code = ["../csrc", "../python", "../fastkernels"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code])
    return name.stdout.strip() + ("+" if changed.returncode else "")


def machine(model: torch.nn.Module | None = None) -> str:
    """The device that `model` is on, or this processor, with the versions of torch and Python."""
    place = f"{platform.processor() or platform.machine()}, one thread per run"
    if model is not None and next(model.parameters()).is_cuda:
        place = torch.cuda.get_device_name()
    return f"{place}; torch {torch.__version__}, Python {platform.python_version()}"
