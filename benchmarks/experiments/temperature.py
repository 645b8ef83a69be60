"""At which temperature do held-back source inputs foretell the source loss of test data?

    python -m benchmarks.experiments.temperature --data FOLDER

Each of four runs per pair is measured five times: the rise of the labelled source test loss, over
the divergence of the source head's answers to held-back inputs without labels, at several
temperatures.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.real_pairs import real_pair
from fast.curvature.card.answers import divergence
from fast.data.source_inputs import SourceInputs
from fast.heads.outputs import source_logits

PAIRS = "resnet20 -> gtsrb,resnet32 -> fashion_mnist,mobilenet 0.25 -> flowers"
# From runs that hardly forget to runs that forget all there is.
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fast", {}),
    ("fast", {"rehearse": 0.05, "distill": 0.0, "anchor_decay": 0.01}),
    ("l2-sp", {}),
    ("vanilla", {}),
)
RATE = 1e-3
CHECKS = 5
TEMPERATURES = (1, 2, 3)


def run(*, pair: str, method: str, options: dict[str, Any], data: Path) -> Record:
    """One run: at each check, the rise of the loss and the divergences `T KL` of answers over T.

    A check has the weights that the run would return there.
    """
    torch.manual_seed(0)
    real = real_pair(pair, data)
    model, inputs, half = real.model, real.source_inputs, len(real.source_inputs) // 2
    test, held = SourceInputs.parse(real.source, 10_000), SourceInputs(inputs=inputs[half:])
    test_before, held_before = (source_logits(model, x) for x in (test, held))
    loss_before = F.cross_entropy(test_before, test.labels)
    protect = {"source_inputs": inputs[:half]} if method == "fast" else {}
    adaptation = fast.Adaptation(
        model, real.train, method=method, lr=RATE, steps=real.steps, **options, **protect
    )
    optimizer, scheduler = adaptation.optimizer, adaptation.scheduler()
    checks = []
    for x, y, rows in adaptation.batches():
        model.train()
        logits, penalty = adaptation.forward(x, rows)
        (F.cross_entropy(logits, y) + penalty).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if adaptation.done % (real.steps // CHECKS) == 0:
            with adaptation.averaged():
                test_now, held_now = (source_logits(model, z) for z in (test, held))
            figures = {"rise": float(F.cross_entropy(test_now, test.labels) - loss_before)}
            for t in TEMPERATURES:
                figures[f"T={t}"] = t * float(divergence(held_before, held_now, t))
            checks.append({name: round(value, 5) for name, value in figures.items()})
    return {"looks": checks}


def report(records: list[Record]) -> list[str]:
    names = [f"T={t}" for t in TEMPERATURES]
    rows = []
    for pair in dict.fromkeys(r["pair"] for r in records):
        checks = [check for r in records if r["pair"] == pair for check in r["looks"]]
        for low, high in ((0.0, 3.0), (3.0, 1e9)):
            some = [c for c in checks if low <= c["rise"] < high]
            if some:
                spans = {"rise of the test loss": [c["rise"] for c in some]}
                spans |= {f"`T KL`, {n}": [c["rise"] / c[n] for c in some] for n in names}
                figures = {n: f"{min(v):.2f} .. {max(v):.2f}" for n, v in spans.items()}
                rows.append({"pair": pair} | figures)
    text = "Rise of the source loss on labelled test data over what held-back inputs say, nats."
    return [
        *table(rows),
        "",
        f"{text} {machine()}. {commits(records)}.",
    ]


def main() -> None:
    args = arguments(__doc__, PAIRS).parse_args()
    pairs = args.pairs.split(",")
    settings = [
        {"pair": pair, "method": method, "options": options}
        for pair, (method, options) in product(pairs, RUNS)
    ]
    records = complete("temperature", run, settings, data=args.data.resolve())
    save("temperature", report([r for r in records if r["pair"] in pairs]))


if __name__ == "__main__":
    main()
