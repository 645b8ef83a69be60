"""`pytest -m slow -s tests/campaigns/test_ops.py`: the update ops and the optimizers under random
right and wrong input. The seed is printed, and FAST_CAMPAIGN_SEED sets it; docs/reliability.md has
the figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from campaigns.children import run_cases, seed
from fastkernels.backends import native

FOLDER = Path(__file__).parent
TRITON = {"TRITON_INTERPRET": "1"} if importlib.util.find_spec("triton") else {}
SMALL = {"FAST_CAMPAIGN_ELEMENTS": "2000"}  # the interpreter takes a second for each list
NATIVE = {"FASTKERNELS_BACKEND": "native"}
# (environment, first list, last list): 3000 in all.
SHARES = {
    "best": (NATIVE, 0, 1150),
    "avx2": (NATIVE | {"FASTKERNELS_CPU": "avx2"}, 1150, 1750),
    "baseline": (NATIVE | {"FASTKERNELS_CPU": "baseline"}, 1750, 2350),
    "reference": ({"FASTKERNELS_BACKEND": "reference"}, 2350, 2960),
    "triton": (TRITON | {"FASTKERNELS_BACKEND": "triton", **SMALL}, 2960, 3000),
}
WRONG_INPUTS = 500


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_lists_against_float64(share):
    environment, first, last = SHARES[share]
    if environment["FASTKERNELS_BACKEND"] == "native" and not native.available()[0]:
        pytest.skip(native.available()[1])
    if environment["FASTKERNELS_BACKEND"] == "triton" and not TRITON:
        pytest.skip("triton is not installed")
    outcome = run_cases(FOLDER / "fuzz_ops.py", first, last, environment)
    wrong = [r for r in outcome.records if r["wrong"]]
    tensors = sum(r["tensors"] for r in outcome.records)
    print(
        f"\n{share}, seed {seed()}: {len(outcome.records)} lists, {tensors} tensors, "
        f"{len(wrong)} wrong, {len(outcome.crashes)} crashes"
    )
    assert len(outcome.records) + len(outcome.crashes) == last - first
    assert not outcome.crashes
    assert not wrong, wrong[:5]


@pytest.mark.slow
def test_wrong_inputs_are_refused_alike():
    """By every backend, with the same error, before anything is written."""
    outcome = run_cases(FOLDER / "wrong_input.py", 0, WRONG_INPUTS, TRITON)
    backends = sorted({name for r in outcome.records for name in r["said"]})
    failed = [
        r
        for r in outcome.records
        if len(set(r["said"].values())) > 1
        or "accepted" in r["said"].values()
        or any(r["changed"].values())
    ]
    print(
        f"\n{', '.join(backends)}, seed {seed()}: {len(outcome.records)} wrong inputs, "
        f"{len(failed)} not refused alike, {len(outcome.crashes)} crashes"
    )
    assert len(outcome.records) + len(outcome.crashes) == WRONG_INPUTS
    assert not outcome.crashes
    assert not failed, failed[:5]
