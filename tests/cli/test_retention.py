"""`fast retention`: the points of a curve, its files, and runs that are not repeated."""

import csv
import dataclasses
import json

import pytest

import fast
from fast.adapt.defaults import EASED, LEAST_REHEARSE, REHEARSING_LR, SETTLED
from fast.adapt.methods import METHODS
from fast.adapt.plan import plan_for
from fast.cli.commands.retention import settings
from fast.cli.task import digits
from fast.train.config import TrainConfig

SWEEP = ("--steps", 6, "--output", "out")


FACTS = {"steps": 60, "head_is_last": True, "batch_norms": True}


def points(plan, strengths=(0.5, 2), budgets=None):
    return [(s.label, s.options) for s in settings(plan, strengths, budgets)]


def planned(method, **options):
    facts = FACTS | {k: options.pop(k) for k in ("weighted", "rehearsed") if k in options}
    return plan_for(TrainConfig(method=method, **options), **facts)


def test_strengths_multiply_what_the_method_itself_sets():
    fast_ = METHODS["fast"]
    assert points(planned("fast", rehearse=0.0)) == [
        (label, {"anchor_decay": s * fast_.anchor_decay, "distill": s * fast_.distill})
        for label, s in (("0.5", 0.5), ("2", 2))
    ]
    informed = points(planned("fast", rehearse=0.0, weighted=True))
    assert informed[0][1]["anchor_decay"] == 0.5 * fast_.card_decay
    assert points(planned("l2-sp")) == [
        ("0.5", {"anchor_decay": 0.5 * METHODS["l2-sp"].anchor_decay}),
        ("2", {"anchor_decay": 2 * METHODS["l2-sp"].anchor_decay}),
    ]
    assert points(planned("ewc", weighted=True), (0.0,)) == [("0", {"anchor_decay": 0.0})]


def test_strengths_multiply_what_holds_a_method_that_rehearses():
    """Strength 1 is the run without the sweep; 0 differs in nothing but what holds the source."""
    plan = planned("fast", rehearsed="source inputs")
    assert plan.batch_norm == "per_task"
    (none, one) = (options for _, options in points(plan, (0, 1)))
    assert one == {name: getattr(plan, name) for name in ("anchor_decay", "rehearse")}
    weak = planned("fast", **none, weighted=True)
    held = dict.fromkeys(one, 0.0) | {"rehearsed": "", "weighted": True}
    assert dataclasses.asdict(weak) == dataclasses.asdict(plan) | held
    (_, ewc) = points(planned("ewc", rehearse=1.0, weighted=True, rehearsed="source inputs"))[0]
    assert ewc["anchor_decay"] == 0.5 * EASED * METHODS["ewc"].card_decay


def test_a_strength_of_nought_keeps_the_learning_rate(job):
    args = ("--methods", "fast", "--strengths", "0,1", "--source-inputs", "source.npz")
    code, _, err = job.fast("retention", *job.args, *SWEEP, *args)
    assert code == 0, err
    saved = json.loads((job.folder / "out" / "retention.json").read_text())
    assert [p["lr"] for p in saved["points"]] == [REHEARSING_LR * (6 / SETTLED) ** 2] * 2
    assert [p["rehearse"] for p in saved["points"]] == [0, LEAST_REHEARSE]  # few samples


def test_distillation_is_left_out_where_batch_norm_is_kept_per_task():
    plan = planned("fast", batch_norm="per_task")
    assert all("distill" not in options for _, options in points(plan))


def test_a_method_that_holds_nothing_is_one_point():
    assert points(planned("vanilla")) == [("", {})]


def test_budgets_start_with_the_largest():
    budgets = points(planned("fast"), budgets=("0.1", "0.3"))
    assert budgets == [("0.3", {"forget_budget": "0.3"}), ("0.1", {"forget_budget": "0.1"})]


def test_sweep_is_drawn_written_and_kept(job, monkeypatch):
    args = ("--methods", "l2-sp,vanilla", "--strengths", "100,0", "--seeds", "0,1", *SWEEP)
    code, out, err = job.fast("retention", *job.args, *args)
    assert code == 0, err
    folder = job.folder / "out"
    saved = json.loads((folder / "retention.json").read_text())
    by_label = {(p["method"], p["label"]): p for p in saved["points"]}
    assert list(by_label) == [("l2-sp", "0"), ("l2-sp", "100"), ("vanilla", "")]
    # Without a pull it is vanilla; with a hundredfold one nothing moves.
    for name in ("target", "source", "target_half"):
        assert by_label["l2-sp", "0"][name] == pytest.approx(by_label["vanilla", ""][name])
    assert saved["source_accuracy_before"] == by_label["l2-sp", "100"]["source"]
    assert by_label["vanilla", ""]["seeds"] == 2
    assert (folder / "retention.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "retention.csv").read_text().splitlines()))
    assert [float(r["source"]) for r in rows] == [p["source"] for p in saved["points"]]
    assert "\nl2-sp    100 " in out
    assert "\nl2-sp    strength 100 seed 0 lr " in out

    monkeypatch.setattr(fast, "finetune", lambda *a, **k: pytest.fail("ran again"))
    code, out, err = job.fast("retention", *job.args, *args)
    assert code == 0, err
    assert out.count("kept from before") == 6


def test_demo_needs_no_files(job, monkeypatch):
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
    monkeypatch.setattr(digits, "PRETRAIN_EPOCHS", 1)
    code, out, err = job.fast("retention", "--demo", "--strengths", "1", "--steps", 2)
    assert code == 0, err
    assert (job.folder / "runs" / "retention-digits" / "retention.png").is_file()
    assert "\nfast    1 " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "fast,adam"], "--methods: no method 'adam'; there are fast,"),
        (["--methods", "replay"], "replay trains on source inputs, and none were given"),
        (["--strengths", "1,-2"], "--strengths must be 0 or more; got -2"),
        (["--strengths", "1", "--budgets", "0.1"], "give --strengths or --budgets, not both"),
        (["--budgets", "0.1,x"], "argument --budgets: a budget must be nats of source loss"),
        (["--demo"], "--demo brings its own model and data; drop --model"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--anchor-decay", "1"], "unrecognized arguments: --anchor-decay 1"),
    ],
)
def test_bad_input_says_so_and_writes_nothing(job, options, message):
    code, _, err = job.fast("retention", *job.args, *SWEEP, *options)
    assert code == 2
    assert message in err
    assert not (job.folder / "out").exists()


def test_source_is_needed(job):
    args = [a for a in job.args if a not in ("--source", "source.npz")]
    code, _, err = job.fast("retention", *args, *SWEEP)
    assert code == 2
    assert "--source must be given" in err
