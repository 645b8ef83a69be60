"""`fast landscape`: the table, its files, and what it refuses."""

import json

import pytest

from fast.cli.task import digits

RUN = ("--steps", 6, "--eval-every", 2, "--resolution", 3, "--samples", 40, "--output", "out")


def test_landscape_of_two_methods(job):
    code, out, err = job.fast("landscape", *job.args, *RUN, "--stiff", 2)
    assert code == 0, err
    saved = json.loads((job.folder / "out" / "landscape.json").read_text())
    assert [p["name"] for p in saved["paths"]] == ["fast", "vanilla"]
    assert saved["paths"][0]["steps"] == [0, 2, 4, 6]
    assert (saved["source_samples"], saved["target_samples"]) == (40, 40)
    assert len(saved["eigenvalues"]) == 2
    assert saved["options"]["data"] == "target.npz"
    assert (job.folder / "out" / "landscape.png").read_bytes().startswith(b"\x89PNG")
    assert "\nvanilla " in out
    assert f"{saved['paths'][1]['drift'][-1]:.2f}" in out


def test_landscape_of_one_method_by_the_hessian(job):
    args = ("--methods", "l2-sp", "--matrix", "hessian", "--stiff", 1)
    code, _, err = job.fast("landscape", *job.args, *RUN, *args)
    assert code == 0, err
    saved = json.loads((job.folder / "out" / "landscape.json").read_text())
    assert saved["matrix"] == "hessian"
    assert [p["name"] for p in saved["paths"]] == ["l2-sp"]


def test_demo_needs_no_files(job, monkeypatch):
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
    monkeypatch.setattr(digits, "PRETRAIN_EPOCHS", 1)
    code, out, err = job.fast("landscape", "--demo", *RUN[:-2], "--stiff", 1)
    assert code == 0, err
    assert (job.folder / "runs" / "landscape-digits" / "landscape.png").is_file()
    assert "runs/landscape-digits: landscape.png, landscape.json" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "adam"], "--methods: no method 'adam'; there are fast,"),
        (["--methods", "replay"], "replay trains on source inputs, and none were given"),
        (["--resolution", "2"], "--resolution must be at least 3; got 2"),
        (["--samples", "1"], "--samples must be at least 2; got 1"),
        (["--stiff", "0"], "--stiff must be at least 1; got 0"),
        (["--stiff", "1000"], "num_stiff must lie between 1 and P = "),
        (["--source", "target.npz"], "--source target.npz: labels must be 0..2"),
        (["--lr", "1e-30"], "the weights did not move"),
        (["--batch-norm", "track"], "--batch-norm track changes the source loss"),
        (["--methods", "fast,adapter"], "--methods: adapter moves no weight of the source task"),
        (["--demo"], "--demo brings its own model and data; drop --model"),
    ],
)
def test_bad_input_says_so_and_writes_nothing(job, options, message):
    code, _, err = job.fast("landscape", *job.args, *RUN, "--methods", "vanilla", *options)
    assert code == 2
    assert message in err
    assert err.splitlines()[-1].startswith("fast: error: ")
    assert not (job.folder / "out").exists()


def test_source_is_needed(job):
    args = [a for a in job.args if a not in ("--source", "source.npz")]
    code, _, err = job.fast("landscape", *args, *RUN)
    assert code == 2
    assert "--source must be given" in err


def test_points_without_a_place_on_logarithmic_axes_are_counted(job):
    code, out, err = job.fast("landscape", *job.args, *RUN, "--stiff", 1, "--lr", 1e-6)
    assert code == 0, err
    paths = json.loads((job.folder / "out" / "landscape.json").read_text())["paths"]
    pairs = [
        pair
        for p in paths
        for kind in ("forecast", "card_forecast")
        for pair in zip(p["rise"][1:], p[kind][1:], strict=True)
    ]
    count = sum(min(pair) <= 1e-4 for pair in pairs)
    assert count > 0
    assert f"\n{count} points are not in the figure of forecasts" in out
