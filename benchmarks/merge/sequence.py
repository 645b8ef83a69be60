"""Three tasks in a row, joined after each: how much of the earlier ones is left.

    python -m benchmarks.merge.sequence --data FOLDER --networks FOLDER

ResNet-20 knows CIFAR-10, then learns traffic signs, then the letters of many alphabets. Each time
it is adapted with a few hundred inputs of the tasks before as its source inputs (500 pictures of
CIFAR-10; then 250 of them and 250 signs), and joined. Accuracies are over the classes of all tasks
so far. The first two tasks are those of `benchmarks.merge.join`, whose network it starts from.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

import fast
from benchmarks.common import Record, commits, complete, machine, save, table
from benchmarks.merge.join import network
from benchmarks.merge.networks import held_back, kept, logits_of
from benchmarks.real_pairs import Split, real_pair

PAIRS = ("resnet20 -> gtsrb", "resnet20 -> omniglot")
TASKS = ("cifar10", "gtsrb", "omniglot")


def run(*, seed: int, data: Path, networks: Path) -> Record:
    """Accuracy on each task after each of them, in 0..1."""
    signs, letters = (real_pair(pair, data) for pair in PAIRS)
    old = logits_of(signs.model, signs.source[0][:2]).shape[1]
    firsts = (0, old, old + signs.num_classes)
    sets = (signs.source, signs.val, letters.val)
    tests = [(x, first + y) for (x, y), first in zip(sets, firsts, strict=True)]
    after = [accuracies(signs.model, tests[:1])]
    adapted = network(signs, PAIRS[0], seed, "join", data, networks)
    calibration = held_back(signs)[1]
    two = fast.join(adapted, source_inputs=signs.source_inputs, data=calibration)
    after.append(accuracies(two, tests[:2]))

    inputs = torch.cat([signs.source_inputs[::2], held_back(signs)[0][0][:250]])
    train, calibration = held_back(letters)

    def third() -> torch.nn.Module:
        torch.manual_seed(seed)
        return fast.finetune(
            copy.deepcopy(two.network),
            train,
            num_classes=letters.num_classes,
            source_inputs=inputs,
            batch_norm="frozen",
            steps=letters.steps,
            seed=seed,
            progress=False,
        ).model

    model = kept(networks, f"{PAIRS[0]} -> omniglot {seed}", third)
    three = fast.join(model, source_inputs=inputs, data=calibration, source_classes=two.rows)
    after.append(accuracies(three, tests))
    return {"after": after, "classes": len(three.classes), "machine": machine()}


def accuracies(model: torch.nn.Module, tests: list[Split]) -> list[float]:
    """On the test samples of each task, among all classes of the network."""
    return [(logits_of(model, x).argmax(1) == y).double().mean().item() for x, y in tests]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder: real_pairs.py")
    parser.add_argument("--networks", type=Path, required=True, help="folder for trained networks")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    folders = {"data": args.data.resolve(), "networks": args.networks.resolve()}
    settings = [{"seed": int(seed)} for seed in args.seeds.split(",")]
    records = complete("join_sequence", run, settings, **folders)
    rows = []
    for step, task in enumerate(TASKS):
        means = torch.tensor([r["after"][step] for r in records]).mean(0)
        cells = {t: f"{100 * a:.1f}" for t, a in zip(TASKS, means.tolist(), strict=False)}
        rows.append({"after": task} | dict.fromkeys(TASKS, "") | cells)
    seeds = [r["seed"] for r in records]
    note = (
        f"Percent, among all classes so far; means over seeds {seeds}. Commit {commits(records)}."
    )
    save("join_sequence", [*table(rows), "", note, "", records[0]["machine"]])


if __name__ == "__main__":
    main()
