"""`fast synthetic`: a file that `fast finetune --source-inputs` takes."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize(
    "images",
    [
        (),
        ("--input-size", 8, "--mean", 0.4, "--std", 0.6),
        ("--input-size", 8, "--mean", "none", "--std", "none"),
    ],
)
def test_what_it_writes_is_kept_by_a_run(job, images):
    """As it is: it has gone through what --data goes through."""
    network = ("--model", "nets.py:Net", "--weights", "net.safetensors", "--data", "target.npz")
    network += images
    code, out, err = job.fast("synthetic", *network, "--count", 40, "--steps", 5, "-o", "made.npz")
    assert code == 0, err
    assert "44 inputs in made.npz: pass them as --source-inputs" in out
    assert (
        "40 synthetic inputs and 4 own ones; a channel's distribution differs from that in" in err
    )
    made = np.load(job.folder / "made.npz")["x"]
    assert made.shape == (44, 1, 8, 8)
    assert made.dtype == np.float32
    code, out, err = job.fast(
        "finetune", *network, "--source-inputs", "made.npz", "--steps", 4, "--output", "run",
        "--no-progress",
    )  # fmt: skip
    assert code == 0, err
    assert "source inputs, whose features are kept" in out + err


def test_what_cannot_be_made_is_said(job):
    network = ("--model", "nets.py:Net", "--weights", "net.safetensors")
    for options, message in (
        (("--data", "target.npz"), "--output must be given: a file that ends in .npz"),
        (("--data", "target.npz", "-o", "nets.py/made.npz"), "nets.py: is a file; name a folder"),
        (("-o", "made.npz"), "--data must be given"),
        (("--data", "target.npz", "-o", "a.npz", "--count", 3), "--count must be at least 4"),
    ):
        code, _, err = job.fast("synthetic", *network, *options)
        assert code == 2
        assert message in err
        assert not (job.folder / "made.npz").exists()
