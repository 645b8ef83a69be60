"""`fast curvature`."""

from __future__ import annotations

import sys
from pathlib import Path

from fast.cli.report.curvature import figure, text
from fast.cli.report.results import write_results
from fast.cli.spec import CurvatureSpec
from fast.cli.task.losses import TaskLoss, losses_of
from fast.curvature import (
    GGN,
    Hessian,
    SecondDerivativeError,
    Summary,
    keep_freed_memory,
    summarise,
)
from fast.figures import save
from fast.files import check_writable

KINDS = {"hessian": Hessian, "ggn": GGN}


def run(spec: CurvatureSpec) -> int:
    keep_freed_memory()
    folder = Path(spec.output or _default_output(spec))
    check_writable(folder, "--output")
    summaries, losses = {}, {}
    for loss in losses_of(spec):
        print(f"{loss.name}: {loss.samples} samples of {loss.data}", file=sys.stderr)
        summaries[loss.name], method = _summary(spec, loss)
        losses[loss.name] = summaries[loss.name].as_dict() | {"method": method}
    write_results(folder / "curvature.json", spec, losses=losses)
    if spec.probes:
        save(figure(spec.kind, summaries), folder / "spectrum.png")
    print(text(spec.kind, summaries))
    print(f"\n{folder}: curvature.json" + (", spectrum.png" if spec.probes else ""))
    return 0


def _default_output(spec: CurvatureSpec) -> Path:
    if spec.checkpoint:
        return Path(spec.checkpoint) / "curvature"
    return Path("runs") / f"curvature-{spec.task.short_name}"


def _summary(spec: CurvatureSpec, loss: TaskLoss) -> tuple[Summary, str]:
    """The curvature of a loss, and how its products are computed."""
    kind = KINDS[spec.kind]
    operator = kind(loss.model, "cross_entropy", loss.batches, spec.params, seed=spec.seed)
    try:
        summary = summarise(
            operator,
            num_top=spec.top,
            trace_matvecs=spec.trace_products,
            num_probes=spec.probes,
            num_lanczos_steps=spec.lanczos_steps,
            layers="layer" if spec.layers else None,
            seed=spec.seed,
            progress=spec.progress,
        )
    except SecondDerivativeError as error:
        raise ValueError(str(error)) from error
    return summary, operator.explain()
