"""`fast landscape`."""

from __future__ import annotations

import dataclasses

import fast
from fast.adapt.methods import METHODS
from fast.analysis.landscape import WeightPath
from fast.analysis.landscape.draw import draw
from fast.cli.report.landscape import notes, table
from fast.cli.report.results import write_results
from fast.cli.report.table import percent, text_table
from fast.cli.runs import opened, runnable
from fast.cli.spec import LandscapeSpec
from fast.cli.task.load import LoadedTask
from fast.figures import save


def run(spec: LandscapeSpec) -> int:
    with opened(spec, "landscape") as (task, folder):
        methods = [m for m in runnable(spec.methods, task) if not METHODS[m].adapter_rank]
        paths = [_path(spec, task, method) for method in methods]
        landscape = fast.landscape(
            paths,
            task.source,
            task.val,
            resolution=spec.resolution,
            samples=spec.samples,
            num_stiff=spec.stiff,
            matrix=spec.matrix,
            seed=spec.training.seed,
            progress=spec.training.progress,
        )
    save(draw(landscape, title=task.name), folder / "landscape.png")
    write_results(folder / "landscape.json", spec, **landscape.to_dict())
    print("\n" + text_table(*table(landscape)))
    print(notes(landscape))
    print(f"\n{folder}: landscape.png, landscape.json")
    return 0


def _path(spec: LandscapeSpec, task: LoadedTask, method: str) -> WeightPath:
    """The path of one run."""
    recorder = fast.PathRecorder(task.source)
    config = dataclasses.replace(spec.training, method=method)
    result = task.adapt(config, source=recorder)
    path = recorder.path(result)
    print(
        f"{method}: {path.steps[-1]} steps, target {percent(result.target_accuracy)} %, source "
        f"{percent(result.source_accuracy_before)} -> {percent(result.source_accuracy)} %"
    )
    return path
