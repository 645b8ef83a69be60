"""`fast export`."""

from __future__ import annotations

from fast.cli.spec import ExportSpec
from fast.cli.task.run import open_run
from fast.errors import printable


def run(spec: ExportSpec) -> int:
    folder = open_run(spec).export(spec.output, spec.format)
    names = sorted(file.name for file in folder.iterdir())
    print(f"{printable(folder)}: {', '.join(map(printable, names))}")
    return 0
