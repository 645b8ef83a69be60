"""One softmax over old and new classes: `fast.join` beside what else gives one, as a table.

    python -m benchmarks.merge.join --data FOLDER --networks FOLDER

All networks learn for the same number of steps and have the same few hundred unlabelled source
inputs. FAST trains without a tenth of the target's samples, with which the heads are then brought
to one scale; the baselines train with all. Accuracies are over all classes, on test samples of both
tasks; calibration error and union accuracy give each task an equal share. Finished runs are kept in
`benchmarks/results/join.jsonl` and trained networks in `--networks`, so that another way to
calibrate costs seconds.

* oracle: FAST's two heads, and somebody who says which task an input is of;
* side by side: the same two heads as they are;
* replay: one head for all classes, trained on target and source inputs in equal parts;
* LwF: one head for all classes, and the source's softened answers on target inputs are kept;
* LP-FT: the heads side by side, as they are after training; joined: brought to one scale as ours;
* nearest mean: of the features of each class, in the pretrained network or that of replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.runs import baseline_rate
from benchmarks.merge.networks import (
    adapted,
    features_by_parts,
    held_back,
    kept,
    logits_of,
    trained_jointly,
)
from benchmarks.real_pairs import RealPair, real_pair
from fast.heads import find_head, task_head

PAIRS = "resnet20 -> gtsrb,resnet20 -> omniglot,mobilenet 0.25 -> flowers,resnet32 -> fashion_mnist"
# The joined ones first: one function of the input, then norms per task.
TWO_PASSES = "join, two passes"
JOINED = {"join": "frozen", TWO_PASSES: "per_task"}
LP_FT_JOINED = "lp-ft, joined"
BASELINES = ("replay", "lp-ft", LP_FT_JOINED, "lwf", "nearest mean", "nearest mean, replay")
METHODS = ("join", "side by side", *BASELINES, TWO_PASSES)
NO_NORMS = ("mobilenet 0.25 -> flowers",)  # so there is one function anyway
WANTED = 0.95  # of the oracle's harmonic mean
BINS = 15


def run(*, pair: str, seed: int, method: str, data: Path, networks: Path) -> Record:
    """The figures of one network on the union of both test sets."""
    real = real_pair(pair, data)
    model = network(real, pair, seed, method, data, networks)
    facts: Record = {}
    if method in (*JOINED, LP_FT_JOINED):
        joined = fast.join(model, source_inputs=real.source_inputs, data=held_back(real)[1])
        answers = both(joined, real)
        facts = {"passes": joined.passes, "oracle": oracle(model, real), **vars(joined.calibration)}
    elif method.startswith("nearest mean"):
        answers = nearest_means(model, real, pair, data)
    elif task_head(model) is not None:
        answers = side_by_side(model, real)
    else:
        answers = both(model, real)
    return figures(answers, real) | facts | {"machine": machine()}


def network(
    real: RealPair, pair: str, seed: int, method: str, data: Path, networks: Path
) -> nn.Module:
    """The trained network that a method needs, of the folder `networks` where it is there."""
    if method == "nearest mean":
        return real.model
    if method in (*JOINED, "side by side"):
        policy = JOINED.get(method, "frozen")

        def fast_network() -> nn.Module:
            train = held_back(real)[0]
            options = {"source_inputs": real.source_inputs, "batch_norm": policy}
            return adapted(pair, seed, data, train=train, **options)

        return kept(networks, f"{pair} {policy} {seed}", fast_network)
    lr = baseline_rate(pair)
    name = method.removeprefix("nearest mean, ").removesuffix(", joined")
    if name == "lp-ft":
        return kept(
            networks, f"{pair} {name} {seed}", lambda: adapted(pair, seed, data, method=name, lr=lr)
        )
    return kept(
        networks, f"{pair} {name} {seed}", lambda: trained_jointly(pair, seed, data, name, lr)
    )


def both(model: nn.Module, real: RealPair) -> list[Tensor]:
    """Logits over all classes of the source's test samples, and of the target's."""
    return [logits_of(model, x) for x, _ in (real.source, real.val)]


def side_by_side(model: nn.Module, real: RealPair) -> list[Tensor]:
    with fast.source_task(model):
        source = both(model, real)
    return [torch.cat(pair, 1) for pair in zip(source, both(model, real), strict=True)]


def oracle(model: nn.Module, real: RealPair) -> list[float]:
    """Accuracy of each head on its own task."""
    with fast.source_task(model):
        source = logits_of(model, real.source[0])
    answers = source, logits_of(model, real.val[0])
    labels = real.source[1], real.val[1]
    return [(z.argmax(1) == y).double().mean().item() for z, y in zip(answers, labels, strict=True)]


def nearest_means(model: nn.Module, real: RealPair, pair: str, data: Path) -> list[Tensor]:
    """Negative distances of normalised features to the mean of each class (iCaRL, Rebuffi et al.
    2017, arXiv 1611.07725); the source's classes are those that the pretrained network says."""
    head = find_head(model, real.train[0][:2]).module
    asked = logits_of(real_pair(pair, data).model, real.source_inputs)
    old = asked.shape[1]

    def features(x: Tensor) -> Tensor:
        return F.normalize(features_by_parts(model, head, x), dim=1)

    groups = (
        (features(real.source_inputs), asked.argmax(1)),
        (features(real.train[0]), old + real.train[1]),
    )
    means = torch.zeros(old + real.num_classes, groups[0][0].shape[1])
    for rows, labels in groups:
        means.index_add_(0, labels, rows)
    empty = means.norm(dim=1) == 0
    means = F.normalize(means, dim=1)
    return [
        -torch.cdist(features(x), means).masked_fill(empty, torch.inf)
        for x in (real.source[0], real.val[0])
    ]


def figures(answers: list[Tensor], real: RealPair) -> Record:
    """Accuracy on each task and over both, and the expected calibration error."""
    old = answers[0].shape[1] - real.num_classes
    labels = real.source[1], old + real.val[1]
    right = [(z.argmax(1) == y).double() for z, y in zip(answers, labels, strict=True)]
    source, target = (r.mean().item() for r in right)
    return {
        "source": source,
        "target": target,
        "union": (source + target) / 2,
        "harmonic": harmonic(source, target),
        "ece": calibration_error([z.softmax(1).amax(1).double() for z in answers], right),
    }


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def calibration_error(confidences: list[Tensor], right: list[Tensor]) -> float:
    """Expected calibration error in `BINS` bins (Guo et al. 2017); tasks weigh alike."""
    weight = torch.cat([torch.full_like(c, 0.5 / len(c)) for c in confidences])
    confidence, correct = torch.cat(confidences), torch.cat(right)
    place = (confidence * BINS).long().clamp_max(BINS - 1)
    gap = torch.zeros(BINS, dtype=weight.dtype).index_add(0, place, weight * (correct - confidence))
    return gap.abs().sum().item()


def report(records: list[Record]) -> Iterator[str]:
    """The table, with what is missed first."""
    seeds = sorted({r["seed"] for r in records})
    rows, misses = [], []
    for pair in dict.fromkeys(r["pair"] for r in records):
        ours = [r for r in records if r["pair"] == pair]
        runs = {m: [r for r in ours if r["method"] == m] for m in METHODS}
        if not runs["join"]:
            continue
        lacking = [m for m in METHODS if not runs[m] and not (pair in NO_NORMS and m == TWO_PASSES)]
        if lacking:
            misses.append(f"{pair}, not measured yet: {', '.join(lacking)}")
        ceilings = {m: mean(harmonic(*r["oracle"]) for r in runs[m]) for m in JOINED if runs[m]}
        for method in (m for m in METHODS if runs[m]):
            score = mean(r["harmonic"] for r in runs[method])
            share = score / ceilings[method] if method in JOINED else None
            rows.append(
                {
                    "pair": pair,
                    "method": f"**{method}**" if method in JOINED else method,
                    "seeds": len(runs[method]),
                    "union accuracy": percent(runs[method], "union"),
                    "source / target": f"{percent(runs[method], 'source')} / "
                    f"{percent(runs[method], 'target')}",
                    "harmonic mean": f"{100 * score:.1f}",
                    "share of its oracle's": "-" if share is None else f"{share:.3f}",
                    "calibration error": "-"
                    if method.startswith("nearest")
                    else percent(runs[method], "ece"),
                }
            )
            if share is not None and share < WANTED:
                misses.append(f"{pair}, {method}: {share:.3f} of the oracle's harmonic mean")
            if method in BASELINES and score >= mean(r["harmonic"] for r in runs["join"]):
                misses.append(f"{pair}: {method} has {100 * score:.1f}, no less than join")
    yield f"Wanted: at least {WANTED} of the oracle's harmonic mean, and more than every baseline."
    yield from ["", *(f"* {miss}" for miss in misses or ["nothing is missed"]), ""]
    yield from table(rows)
    yield from ["", f"Percent; means over seeds {seeds}. Commit {commits(records)}."]
    yield from dict.fromkeys(f"\n{r['machine']}" for r in records)


def percent(runs: list[Record], name: str) -> str:
    return f"{100 * mean(r[name] for r in runs):.1f}"


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--networks", type=Path, required=True, help="folder for trained networks")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    settings = [
        {"pair": pair, "seed": int(seed), "method": method}
        for seed in args.seeds.split(",")
        for pair in args.pairs.split(",")
        for method in args.methods.split(";")
        if not (method == TWO_PASSES and pair in NO_NORMS)
    ]
    folders = {"data": args.data.resolve(), "networks": args.networks.resolve()}
    save("join", report(complete("join", run, settings, **folders)))


if __name__ == "__main__":
    main()
