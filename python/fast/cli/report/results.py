"""The JSON file of a command's results: options, machine, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fast.cli.notes import print_notes
from fast.cli.report.machine import describe
from fast.cli.spec.base import Spec, shown
from fast.files import read_json, write_json

# Options that do not change the results.
SHOWN_ONLY = ("output", "progress")


def write_results(file: Path, spec: Spec, **content: Any) -> None:
    write_json(file, {"options": shown(spec), "machine": describe(), **content})


def note_replaced(file: Path, spec: Spec) -> None:
    """Print how the options of results that are about to be replaced differ from these.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.is_file():
        return
    try:
        before = dict(read_json(file)["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of fast; move it away") from error
    now = json.loads(json.dumps(shown(spec), default=str))
    other = [
        f"{name} {before.get(name, 'not given')}"
        for name in {**before, **now}
        if name not in SHOWN_ONLY and before.get(name) != now.get(name)
    ]
    if other:
        print_notes(
            f"replaces {file}, made with other options ({', '.join(other)}); its runs stay in runs/"
        )
