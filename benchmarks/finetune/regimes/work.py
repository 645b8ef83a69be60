"""What there is to run: the rows of the table, and the settings of their runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from benchmarks.common import Record
from benchmarks.finetune.regimes.methods import METHODS, OURS, rates_of, regimes_of
from benchmarks.finetune.regimes.runs import HALF_STEPS, USUAL_STEPS

PAIRS = (
    "resnet20 -> omniglot,resnet20 -> sign_digits,resnet32 -> fashion_mnist,"
    "mobilenet 0.25 -> trashnet,mobilenet 0.25 -> flowers,minilm -> trec6,minilm -> sst2,"
    "smollm2 -> trec6,vit s14 -> flowers,vit s14 -> gtsrb,vit s14 -> trashnet,"
    "resnet20 -> gtsrb,minilm -> banking77,efficientnet lite0 -> flowers,"
    # No default was chosen on these.
    "resnet44 -> flowers,mobilenet 0.5 -> gtsrb,minilm -> sms_spam"
)
SEEDS = (0, 1, 2)
LENGTHS = (HALF_STEPS, USUAL_STEPS, 400, 1500)
# (steps, samples of each class): the usual run, few samples, half of the steps, longer runs.
PARTS = (
    (USUAL_STEPS, None),
    (USUAL_STEPS, 10),
    (HALF_STEPS, None),
    (400, None),
    (1500, None),
)
# A logistic regression has no steps: one row serves all lengths.
WITHOUT_STEPS = ("linear probe",)
# A setting but for its learning rate and its seed.
ROW = ("pair", "method", "regime", "source_inputs", "steps", "samples")


def rows(
    pairs: Iterable[str], methods: Iterable[str], steps: int, samples: int | None
) -> Iterator[Record]:
    """The rows of one part of the table, without learning rate and seed."""
    usual = (steps, samples) == (USUAL_STEPS, None)
    for pair, name in product(pairs, methods):
        if not (usual or METHODS[name].everywhere):
            continue
        if name in WITHOUT_STEPS and steps != USUAL_STEPS:
            continue
        if steps == HALF_STEPS and name not in OURS:
            continue  # FAST's half is compared with the usual length of the others
        for regime, inputs in product(regimes_of(name, pair), METHODS[name].source_inputs):
            values = (pair, name, regime, inputs, steps, samples)
            yield dict(zip(ROW, values, strict=True))


def runs_of(records: Iterable[Record], row: Record) -> list[Record]:
    return [r for r in records if all(r[key] == row[key] for key in ROW)]


def better_rate(records: Sequence[Record], row: Record) -> float | None:
    """The learning rate of a row with the better target accuracy at the first seed; at lengths
    where only one was run, that of the usual length.

    Raises:
        LookupError: not all rates have been run.
    """
    rates = rates_of(row["method"], row["pair"])
    if len(rates) == 1:
        return rates[0]
    usual = row | {"steps": USUAL_STEPS}
    scores = {r["lr"]: r["target"] for r in runs_of(records, usual) if r["seed"] == SEEDS[0]}
    if not set(rates) <= set(scores):
        raise LookupError(f"not all rates of {usual} have been run")
    return max(rates, key=lambda rate: scores[rate])


def settings(records: Sequence[Record], row: Record, seed: int) -> list[Record]:
    """The runs that a row needs at a seed, as far as the better rate is known."""
    rates: Sequence[float | None] = rates_of(row["method"], row["pair"])
    if seed != SEEDS[0] or row["steps"] != USUAL_STEPS:
        try:
            rates = [better_rate(records, row)]
        except LookupError:
            return []
    return [row | {"lr": lr, "seed": seed} for lr in rates]
