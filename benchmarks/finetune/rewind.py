"""Is forgetting undone? `fast.rewind` on checkpoints that have forgotten, as one table.

    python -m benchmarks.finetune.rewind --data FOLDER --checkpoints FOLDER

Against the plain line (WiSE-FT: all weights and statistics interpolated, to the same budget on the
same held-back source inputs), and against runs of FAST with that budget, which are those of
`benchmarks/results/budget.jsonl`; for 2 points those without a budget, which lose less than that.
The source is measured on labelled test data that no method sees. Finished runs are kept in
`benchmarks/results/rewind.jsonl` and not run again.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.common import RESULTS, Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.tuned import PLAIN, RATES, checkpoint, plain_script
from benchmarks.real_pairs import README_PAIRS, RealPair, real_pair
from fast.adapt.config import Budget
from fast.adapt.guards.budget import AIM
from fast.adapt.guards.forgetting import hold_back
from fast.data.source_inputs import parse_source_inputs
from fast.data.trees import length, pick
from fast.heads import evaluating, find_head, forward_logits, source_task
from fast.heads.find import layer_like

POINTS = ("minilm -> sst2",)
INSIDE = (0.5, 1.5)
BISECTIONS, TIMED_STEPS = 7, 3
WANTED_SHARE, WANTED_GAP = 0.2, 0.5


def run(*, pair: str, method: str, budget: str, seed: int, data: Path, checkpoints: Path) -> Record:
    """One checkpoint rewound to one budget, by `fast.rewind` and on the plain line."""
    real = real_pair(pair, data)
    state, _ = checkpoint(pair, method, seed, data, checkpoints)
    kept = real.source_inputs
    kept = kept if real.source_labels is None else (kept, real.source_labels)
    before = measured(real.model, real, state=None)
    lines = plain_line(real, state, kept, budget)
    start = time.process_time()
    result = fast.rewind(real.model, state, kept, budget, data=real.train, seed=seed)
    seconds = time.process_time() - start
    return {
        "before": before,
        "tuned": measured(real.model, real, state),
        "line": lines,
        "rewound": measured(result.model, real, state=None) | {
            "held_back": result.lost, "stage": result.final["stage"], "place": result.final["place"]
        },
        "seconds": seconds,
        "seconds_of_run": step_seconds(real, pair) * real.steps,
        "machine": machine(),
    }  # fmt: skip


def measured(model: nn.Module, real: RealPair, state: dict[str, Tensor] | None) -> Record:
    """Accuracies and source loss on test data.

    Args:
        state: of a plain network with the target's head; its source head is that of `model`. None:
            `model` answers both tasks, or only the source's.
    """
    target = model if state is None else with_state(model, real, state, target=True)
    source = model if state is None else with_state(model, real, state, target=False)
    x, y = real.val
    record = {"target": (answers(target, x).argmax(1) == y).double().mean().item()}
    with source_task(source), evaluating(source):
        if callable(real.source):
            return record | {"source": real.source(source), "source_loss": None}
        x, y = real.source
        logits = answers(source, x)
    accuracy = (logits.argmax(1) == y).double().mean().item()
    return record | {"source": accuracy, "source_loss": F.cross_entropy(logits, y).item()}


def answers(model: nn.Module, x: Any, size: int = 250) -> Tensor:
    with evaluating(model):
        parts = [pick(x, slice(i, i + size)) for i in range(0, length(x), size)]
        return torch.cat([forward_logits(model, part) for part in parts])


def with_state(
    model: nn.Module, real: RealPair, state: dict[str, Tensor], *, target: bool
) -> nn.Module:
    """A plain network with the weights of `state`, and its head or that of `model`."""
    network = copy.deepcopy(model)
    head = find_head(network, pick(real.train[0], slice(2)))
    prefix = f"{head.name}."
    if target:
        head.put(layer_like(head.module, len(state[f"{prefix}weight"]), f"{prefix}bias" in state))
        network.load_state_dict(state, strict=False)
    else:
        rest = {n: x for n, x in state.items() if not n.startswith(prefix)}
        network.load_state_dict(rest, strict=False)
    return network


def plain_line(real: RealPair, state: dict[str, Tensor], kept: Any, budget: str) -> Record:
    """WiSE-FT: the place on the line where the budget is spent, found by bisection."""
    allowed = Budget.parse(budget)
    _, meter = hold_back(real.model, parse_source_inputs(kept), budget=allowed, skill="auto")
    prefix = f"{find_head(real.model, pick(real.train[0], slice(2))).name}."
    # The heads are of two tasks: the tuned one stays what it is all the way.
    start = {n: x for n, x in real.model.state_dict().items() if not n.startswith(prefix)}

    def at(place: float) -> dict[str, Tensor]:
        return {
            n: torch.lerp(start[n], x, place) if n in start and x.is_floating_point() else x
            for n, x in state.items()
        }

    low, high = 0.0, 1.0
    if meter(with_state(real.model, real, at(1.0), target=False)) <= allowed.amount:
        low = 1.0
    for _ in range(BISECTIONS if low < 1 else 0):
        middle = (low + high) / 2
        lost = meter(with_state(real.model, real, at(middle), target=False))
        low, high = (middle, high) if lost <= AIM * allowed.amount else (low, middle)
    return {"place": low} | measured(real.model, real, at(low))


def step_seconds(real: RealPair, pair: str) -> float:
    """Processor time of a step of the plain script."""
    times = []
    for steps in (1, 1 + TIMED_STEPS):
        part = copy.copy(real)
        object.__setattr__(part, "model", copy.deepcopy(real.model))
        object.__setattr__(part, "steps", steps)
        start = time.process_time()
        plain_script(part, RATES.get(pair, 1e-3), 0)
        times.append(time.process_time() - start)
    return (times[1] - times[0]) / TIMED_STEPS


def lost(record: Record, which: str) -> float:
    """What is lost on test data, in the unit of the budget."""
    before, after = record["before"], record[which]
    if Budget.parse(record["budget"]).points:
        return before["source"] - after["source"]
    return after["source_loss"] - before["source_loss"]


def of_fast(pair: str, budget: str) -> float | None:
    """Target accuracy of FAST's runs, mean over seeds."""
    method = "fast" if budget == "2%" else f"fast:forget_budget={budget}"
    names = {method, method.replace(budget, repr(budget))}
    runs = [json.loads(line) for line in (RESULTS / "budget.jsonl").read_text().splitlines()]
    ends = [
        r["history"][-1]["target_accuracy"]
        for r in runs
        if r["pair"] == pair and r["method"] in names
    ]
    return sum(ends) / len(ends) if ends else None


def report(records: list[Record]) -> list[str]:
    rows = []
    for r in records:
        ratio = lost(r, "rewound") / Budget.parse(r["budget"]).amount
        theirs = of_fast(r["pair"], r["budget"])
        line, ours = r["line"]["target"], r["rewound"]["target"]
        closed = (ours - line) / (theirs - line) if theirs and theirs - line > 0.01 else None
        share = r["seconds"] / r["seconds_of_run"]
        misses = [
            name
            for name, missed in (
                ("budget", not INSIDE[0] <= ratio <= INSIDE[1]),
                ("gap", closed is not None and closed < WANTED_GAP),
                ("time", share > WANTED_SHARE),
            )
            if missed
        ]
        rows.append(
            {
                "missed": ", ".join(misses) or "-",
                "pair": r["pair"],
                "run": f"{r['method']}, seed {r['seed']}",
                "budget": r["budget"],
                "source before -> tuned -> rewound": " -> ".join(
                    f"{100 * r[k]['source']:.1f}" for k in ("before", "tuned", "rewound")
                ) + " %",
                "lost on test data / budget": f"{ratio:.2f}",
                "target: tuned": f"{100 * r['tuned']['target']:.1f}",
                "plain line": f"{100 * line:.1f}",
                "rewound": f"**{100 * ours:.1f}** ({r['rewound']['stage']})",
                "FAST": "-" if theirs is None else f"{100 * theirs:.1f}",
                "gap closed": "-" if closed is None else f"{closed:.2f}",
                "time / run": f"{share:.2f}",
            }
        )  # fmt: skip
    rows.sort(key=lambda row: -len(row["missed"].strip("-")))
    return [
        *table(rows),
        "",
        "Budgets are nats of source loss or points of source accuracy. Wanted: what is lost over "
        f"the budget between {INSIDE[0]} and {INSIDE[1]}, at least {WANTED_GAP} of the gap between the "
        f"plain line and FAST closed, at most {WANTED_SHARE} of the time of the run (processor "
        f"time). {machine()}. Commit {commits(records)}.",
    ]


def main() -> None:
    parser = arguments(__doc__, README_PAIRS)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder; made as needed")
    parser.add_argument("--methods", default=f"vanilla,lp-ft,{PLAIN}")
    parser.add_argument("--nats", default="0.1,0.3", help="budgets of pairs with a source head")
    parser.add_argument("--points", default="2%")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="rewind", help="of the files in benchmarks/results/")
    args = parser.parse_args()
    pairs = args.pairs.split(",")
    settings = [
        {"pair": pair, "method": method, "budget": budget, "seed": int(seed)}
        for seed in args.seeds.split(",")
        for method in args.methods.split(",")
        for pair in (pairs if method != PLAIN else pairs[:1])
        for budget in (
            *(() if pair in POINTS else args.nats.split(",")),
            *args.points.split(","),
        )
    ]
    records = complete(
        args.name, run, settings, args.workers, data=args.data.resolve(),
        checkpoints=args.checkpoints.resolve(),
    )  # fmt: skip
    save(args.name, report([r for r in records if r["pair"] in pairs]))


if __name__ == "__main__":
    main()
