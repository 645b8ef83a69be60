"""What held-back source inputs without labels say about the loss of test data, and what doubt adds.

    python benchmarks/doubt.py --data FOLDER

Five times in each of four runs per pair: the rise of the labelled source test loss, over the
divergence of the source head's answers to held-back inputs, at several temperatures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fast
from fast.curvature.card.answers import divergence
from fast.data.source_inputs import SourceInputs
from fast.heads.outputs import source_logits
from fast.train.trainer import Trainer
from pairs import PAIRS, Folder
from runs import RESULTS, commit, machine

NAMES = "resnet20 -> gtsrb,resnet32 -> fashion_mnist,mobilenet 0.25 -> flowers"
# Hardly any loss, some, and all there is.
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fast", {}),
    ("fast", {"rehearse": 0.05, "distill": 0.0, "anchor_decay": 0.01}),
    ("l2-sp", {}),
    ("vanilla", {}),
)
RATE = 1e-3
LOOKS = 5
TEMPERATURES = (1, 2, 3)


@contextmanager
def watched(look: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Runs are looked at, at the weights that they would return."""
    advance = Trainer.advance

    def looking(self: Trainer, step: int, batch: Any) -> Tensor:
        loss = advance(self, step, batch)
        if (step + 1) % (self.steps // LOOKS) == 0:
            with self._averaged(step + 1):
                look(self.model)
        return loss

    Trainer.advance = looking  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.advance = advance  # type: ignore[method-assign]


def ratios(name: str, method: str, options: dict[str, Any], data: Path) -> list[dict[str, float]]:
    """One run: at each look, the rise and the divergences `T KL` of answers over T."""
    torch.manual_seed(0)
    pair = PAIRS[name]
    job = pair.make(Folder(data))
    inputs, count = job.source_inputs, len(job.source_inputs)
    asked = SourceInputs.parse(job.source, 10_000)
    held = SourceInputs(inputs=inputs[count // 2 :])
    before = [source_logits(job.model, x) for x in (asked, held)]
    labels = asked.labels
    found: list[dict[str, float]] = []

    def look(model: torch.nn.Module) -> None:
        test, now = (source_logits(model, x) for x in (asked, held))
        rise = F.cross_entropy(test, labels) - F.cross_entropy(before[0], labels)
        said = {f"T={t}": t * float(divergence(before[1], now, t)) for t in TEMPERATURES}
        found.append({k: round(v, 5) for k, v in ({"rise": float(rise)} | said).items()})

    known = {"source_inputs": inputs[: count // 2]} if method == "fast" else {}
    with watched(look):
        fast.finetune(
            job.model,
            job.train,
            method=method,
            lr=RATE,
            steps=pair.steps,
            eval_every=pair.steps,
            progress=False,
            **options,
            **known,
        )
    return found


def report(found: dict[str, list[dict[str, float]]], commits: str) -> str:
    names = [f"T={t}" for t in TEMPERATURES]
    lines = [
        "| pair | rise of the test loss | " + " | ".join(f"`T KL`, {n}" for n in names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for pair, rows in found.items():
        for low, high in ((0.0, 3.0), (3.0, 1e9)):
            some = [r for r in rows if low <= r["rise"] < high]
            if not some:
                continue
            spans = [(min(v), max(v)) for v in ([r["rise"] / r[n] for r in some] for n in names)]
            cells = " | ".join(f"{a:.2f} .. {b:.2f}" for a, b in spans)
            rises = [r["rise"] for r in some]
            lines.append(f"| {pair} | {min(rises):.2f} .. {max(rises):.2f} | {cells} |")
    text = "Rise of the source loss on labelled test data over what held-back inputs say, nats."
    lines += ["", f"{text} {machine()}. {commits}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=NAMES, help="names, separated by commas")
    args = parser.parse_args()

    torch.set_num_threads(1)
    store = RESULTS / "doubt.jsonl"
    rows = [json.loads(x) for x in store.read_text().splitlines()] if store.exists() else []
    found: dict[str, list[dict[str, float]]] = {}
    for pair in args.pairs.split(","):
        for method, options in RUNS:
            key = {"pair": pair, "method": method, "options": options}
            if not any(key.items() <= row.items() for row in rows):
                looks = ratios(pair, method, options, args.data.resolve())
                row = key | {"looks": looks, "commit": commit()}
                rows.append(row)
                with store.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
            found.setdefault(pair, []).extend(
                look for row in rows if key.items() <= row.items() for look in row["looks"]
            )
    text = report(found, ", ".join(sorted({row["commit"] for row in rows})))
    (RESULTS / "doubt.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
