"""How the table of the two regimes trains its baselines, on small networks."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import nn

import fast
from benchmarks.audio import FRAME, Crepe, PitchAccuracy, recordings, tones
from benchmarks.finetune.regimes import baselines
from benchmarks.finetune.regimes.methods import METHODS, NORMS, SWITCHED, TOGETHER
from benchmarks.finetune.regimes.samples import Task
from networks import ConvNet


@pytest.fixture
def task():
    """A task of its own: four classes that a linear probe tells apart, on a random network."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 4
    x = torch.randn(64, 1, 8, 8, generator=generator)
    x[torch.arange(64), 0, y, y] += 5.0
    torch.manual_seed(1)
    result = Task.__new__(Task)
    result.model = ConvNet(5).eval()
    result.train = result.val = x, y
    result.source = x, result.model(x).argmax(1).detach()  # known perfectly, at first
    result.options = {"num_classes": 4, "batch_size": 16, "seed": 3}
    return result


PLAIN = ["vanilla", "lp-ft", "spd", "norm-only", "l2-sp", "ewc"]


@pytest.mark.parametrize(
    ("name", "regime"), [(name, regime) for name in PLAIN for regime in METHODS[name].regimes]
)
def test_a_baseline_learns_the_target(task, name, regime):
    method = METHODS[name]
    run = baselines.RUNNERS[method.runner]
    record = run(task, steps=40, lr=1e-2, batch_norm=NORMS[regime], **method.options)
    assert record["source_before"] == 1.0
    assert record["target"] > 0.4  # four classes
    assert record["history"][-1] == {k: record[k] for k in ("target", "source")} | {"step": 40}


def test_the_plain_loop_is_that_of_finetune(task):
    model = task.model
    options = {"method": "lp-ft", "steps": 12, "lr": 1e-2, "batch_norm": "per_task"}
    copy = {name: value.clone() for name, value in model.state_dict().items()}
    baselines.loop(task, **options)
    ours = [p.detach().clone() for p in model.parameters()]
    again = ConvNet(5)
    again.load_state_dict(copy)
    fast.finetune(again, task.train, progress=False, **task.options, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again.parameters(), strict=True))


def test_the_line_goes_from_the_probe_to_the_end(task):
    record = baselines.lp_ft(task, steps=60, lr=1e-2, batch_norm="frozen", method="lp-ft")
    alphas, targets, sources = zip(*record["line"], strict=True)
    assert (alphas[0], alphas[-1]) == (0.0, 1.0)
    assert sources[0] == record["source_before"]  # the probe leaves the backbone alone
    assert (targets[-1], sources[-1]) == (record["target"], record["source"])


def test_norms_that_are_switched_lose_nothing(task):
    for regime, exact in ((TOGETHER, False), (SWITCHED, True)):
        torch.manual_seed(1)
        task.model = ConvNet(5).eval()
        record = baselines.norm_only(
            task, steps=60, lr=0.1, batch_norm=NORMS[regime], method="lp-ft"
        )
        assert (record["source"] == record["source_before"]) is exact


def test_layer_norms_are_switched_too(task):
    torch.manual_seed(1)
    layers = nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5)
    task.model = nn.Sequential(*layers).eval()
    task.source = task.train[0], task.model(task.train[0]).argmax(1).detach()
    options = {"steps": 60, "lr": 0.3, "method": "lp-ft"}
    record = baselines.norm_only(task, batch_norm="per_task", **options)
    assert record["source"] == record["source_before"] == 1.0
    assert record["history"][-1]["source"] < 1.0  # before they were put back


def test_a_linear_probe_changes_nothing(task):
    pytest.importorskip("sklearn", reason="the probe is scikit-learn's logistic regression")
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    record = baselines.linear_probe(task)
    assert record["target"] > 0.5
    assert record["source"] == record["source_before"]
    after = task.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_tones_have_the_pitch_that_is_said():
    frames, cents = tones(20, seed=0)
    assert frames.shape == (20, FRAME)
    frequencies = 10 * 2 ** (cents / 1200)
    # A wave of that frequency is much like itself one period later.
    for frame, frequency in zip(frames, frequencies.tolist(), strict=True):
        period = round(16_000 / frequency)
        likeness = torch.dot(frame[period:], frame[:-period]) / frame[:-period].square().sum()
        assert likeness > 0.8


def test_pitch_accuracy_counts_what_is_within_a_quarter_tone():
    class Exact(nn.Module):
        """Answers the pitch that the tones were made with, moved by some cents."""

        def __init__(self, off):
            super().__init__()
            cents = PitchAccuracy(10, seed=2).cents + off
            self.answers = ((cents - 1997.3794) / 20).round().long()

        def forward(self, x):
            return nn.functional.one_hot(self.answers, 360).float()

    accuracy = PitchAccuracy(10, seed=2)
    assert accuracy(Exact(0.0)) == 1.0
    assert accuracy(Exact(30.0)) == 1.0
    assert accuracy(Exact(70.0)) == 0.0


def test_crepe_takes_frames_and_gives_pitches():
    assert Crepe()(torch.randn(2, FRAME)).shape == (2, 360)


def test_a_recording_is_read_looped_and_played_higher(tmp_path):
    rate, period = 16_000, 40
    wave = [round(20_000 * math.sin(2 * math.pi * i / period)) for i in range(400)]

    def chunk(name, body):
        return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    header = struct.pack("<20s5IBbHH", b"Flute A4", 0, 400, 0, 400, rate, 60, 0, 0, 1)
    body = chunk(b"LIST", b"sdta" + chunk(b"smpl", struct.pack("<400h", *wave)))
    body += chunk(b"LIST", b"pdta" + chunk(b"shdr", header))
    file = tmp_path / "font.sf2"
    file.write_bytes(chunk(b"RIFF", b"sfbk" + body))
    [recording] = recordings(file)
    assert (recording.name, recording.rate, recording.loop) == ("Flute A4", rate, (0, 400))
    expected = [math.sin(2 * math.pi * i / period) * 20_000 / 2**15 for i in range(FRAME)]
    assert torch.allclose(recording.frame(0.0, 0.0), torch.tensor(expected), atol=1e-3)
    octave = recording.frame(0.0, 12.0)
    assert torch.allclose(octave[:500], recording.frame(0.0, 0.0)[:1000:2], atol=1e-3)
