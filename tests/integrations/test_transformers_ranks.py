"""FastTrainer under `torchrun` trains as one process does; the runs: trainer_runs.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from torchrun import torchrun

pytest.importorskip("transformers", reason="the Trainer is its")
pytest.importorskip("datasets", reason="its tables are the Trainer's data")
pytest.importorskip("accelerate", reason="the Trainer needs it")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch has no gloo here",
)
sys.path.insert(0, str(Path(__file__).parent))


def furthest(a, b):
    assert list(a) == list(b)
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one(tmp_path):
    from trainer_runs import CASES, run

    torchrun(2, "trainer_runs", str(tmp_path))
    for name in CASES:
        runs = {
            (kind, rank): torch.load(tmp_path / f"{name} {kind} {rank}.pt")
            for kind in ("whole", "again")
            for rank in (0, 1)
        }
        whole = runs["whole", 0]
        for other in runs.values():
            assert furthest(whole["weights"], other["weights"]) == 0
            assert other["source"] == whole["source"]
        alone = run(tmp_path / f"{name} alone", name)
        # The statistics of the normaliser are kept in float32.
        assert furthest(whole["weights"], alone.model.state_dict()) < 1e-5
        assert whole["source"] == alone.source_accuracy
        last, own = whole["evaluations"][-1], alone.state.log_history
        own = [record for record in own if "eval_accuracy" in record][-1]
        assert last["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-4)
        assert last["eval_source_accuracy"] == own["eval_source_accuracy"]
