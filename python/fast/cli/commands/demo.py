"""`fast demo`."""

from __future__ import annotations

import time
from pathlib import Path

from fast.cli.report.html import save_curves
from fast.cli.report.summary import NOTES, Run, summarise
from fast.cli.report.table import paragraph, text_table
from fast.cli.spec import DemoSpec
from fast.cli.spec.methods import DEMO_LENGTH
from fast.cli.task.digits import digits_task, few_threads
from fast.cli.task.load import LoadedTask
from fast.files import check_writable
from fast.train.config import TrainConfig
from fast.train.log.lines import log, quiet

SEEDS = (0, 1, 2)
VANILLA_LRS = (3e-4, 1e-3)
FAST_LR = 1e-3
STEPS, EVAL_EVERY, BATCH = DEMO_LENGTH["steps"], DEMO_LENGTH["eval_every"], 64


def run(spec: DemoSpec) -> int:
    check_writable(Path(spec.output), "--output")
    start = time.monotonic()
    with few_threads():
        runs = _pretrain_and_adapt(start)
    header, rows = summarise(runs)
    # Runs this short say nothing about the time that a method takes.
    rows = [row[: header.index("seconds")] for row in rows]
    print("\n" + text_table(header[: header.index("seconds")], rows) + f"\n\n{paragraph(NOTES)}")
    figure = Path(spec.output) / "demo.png"
    save_curves(runs, "Digits 0-4, then 5-9", figure)
    print(f"\n{figure} ({time.monotonic() - start:.0f} s in all)")
    return 0


def _pretrain_and_adapt(start: float) -> list[Run]:
    task = digits_task()
    print(f"pretrained on digits 0-4 ({time.monotonic() - start:.0f} s); adapting to 5-9:")
    runs = [_adapt(task, "fast", seed, FAST_LR) for seed in SEEDS]
    vanilla = [[_adapt(task, "vanilla", seed, lr) for seed in SEEDS] for lr in VANILLA_LRS]
    return runs + max(vanilla, key=lambda rs: sum(r.target_accuracy for r in rs))


def _adapt(task: LoadedTask, method: str, seed: int, lr: float) -> Run:
    start = time.monotonic()
    config = TrainConfig(
        method=method,
        steps=STEPS,
        eval_every=EVAL_EVERY,
        batch_size=BATCH,
        lr=lr,
        seed=seed,
        progress=False,
    )
    with quiet(log):  # it names options that this command does not have
        run = Run.of(task.adapt(config), time.monotonic() - start)
    print(f"  {run}")
    return run
