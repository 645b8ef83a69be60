"""The table of the two regimes, on records made by hand, and what its baselines do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.finetune.regimes import figures, report, work
from benchmarks.finetune.regimes.methods import METHODS, OURS, SWITCHED, TOGETHER, regimes_of
from benchmarks.finetune.regimes.samples import few, some
from benchmarks.finetune.regimes.spd import AdamSPD
from benchmarks.finetune.regimes.wise_ft import best_target

PAIR = "resnet20 -> digits"


def record(method, regime, target, source, *, lr=1e-3, seed=0, pair=PAIR, inputs=False, **more):
    curve = more.pop("curve", [(150, target)])
    return {
        "pair": pair, "method": method, "regime": regime, "source_inputs": inputs, "steps": 150,
        "samples": None, "lr": lr, "seed": seed, "target": target, "source": source,
        "source_before": 0.9, "cpu_seconds": 1.0, "commit": "abc", "machine": "a machine",
        "history": [{"step": s, "target": t, "source": source} for s, t in curve],
    } | more  # fmt: skip


def ours(regime, target, source, **more):
    return record("fast", regime, target, source, lr=None, **more)


def row(method, regime, inputs=False, pair=PAIR):
    return dict(zip(work.ROW, (pair, method, regime, inputs, 150, None), strict=True))


def test_each_regime_has_its_own_winner():
    records = [
        ours(TOGETHER, 0.80, 0.89),
        ours(SWITCHED, 0.84, 0.89),
        record("lp-ft", TOGETHER, 0.78, 0.50, lr=3e-4),
        record("lp-ft", TOGETHER, 0.79, 0.60, lr=1e-3),
        record("lp-ft", SWITCHED, 0.86, 0.70, lr=3e-4),
        record("vanilla", TOGETHER, 0.70, 0.40),
    ]
    together = figures.compare(records, row("fast", TOGETHER), TOGETHER)
    assert together.baseline == "lp-ft, one function"
    assert together.ahead == pytest.approx(0.01)
    assert together.lost == pytest.approx(0.01)
    assert together.its_lost == pytest.approx(0.30)
    switched = figures.compare(records, row("fast", SWITCHED), SWITCHED)
    assert switched.baseline == "lp-ft, two functions"
    assert switched.ahead == pytest.approx(-0.02)


def test_what_switches_nothing_is_allowed_in_both_regimes():
    records = [ours(SWITCHED, 0.80, 0.89), record("vanilla", TOGETHER, 0.85, 0.40)]
    assert figures.compare(records, row("fast", SWITCHED), SWITCHED).ahead == pytest.approx(-0.05)


def test_baselines_with_source_inputs_count_only_beside_fast_with_them():
    records = [
        ours(TOGETHER, 0.80, 0.80),
        ours(TOGETHER, 0.81, 0.89, inputs=True),
        record("vanilla", TOGETHER, 0.70, 0.40),
        record("replay", TOGETHER, 0.85, 0.85, inputs=True),
    ]
    without = figures.compare(records, row("fast", TOGETHER), TOGETHER)
    assert without.baseline == "vanilla, one function"
    with_inputs = figures.compare(records, row("fast", TOGETHER, inputs=True), TOGETHER)
    assert with_inputs.baseline == "replay, one function"


def test_seeds_that_only_one_side_has_are_left_out():
    records = [
        ours(TOGETHER, 0.80, 0.89),
        ours(TOGETHER, 0.40, 0.89, seed=1),
        record("vanilla", TOGETHER, 0.75, 0.40),
        record("vanilla", TOGETHER, 0.99, 0.40, seed=2),
    ]
    comparison = figures.compare(records, row("fast", TOGETHER), TOGETHER)
    assert comparison.seeds == 1
    assert comparison.ahead == pytest.approx(0.05)


def test_the_share_of_steps_ends_where_the_goal_is_first_reached():
    curve = [(0, 0.1), (25, 0.6), (50, 0.76), (150, 0.8)]
    rival = record("vanilla", TOGETHER, 0.75, 0.40)
    fast = ours(TOGETHER, 0.80, 0.89, curve=curve)
    assert figures.compare([fast, rival], row("fast", TOGETHER), TOGETHER).share == 50 / 150
    rival |= {"target": 0.85}
    assert figures.compare([fast, rival], row("fast", TOGETHER), TOGETHER).share is None


def test_half_of_the_steps_is_compared_with_all_of_the_baselines():
    curve = [(0, 0.1), (25, 0.6), (50, 0.76), (75, 0.8)]
    records = [
        ours(TOGETHER, 0.80, 0.89, steps=75, curve=curve),
        record("vanilla", TOGETHER, 0.75, 0.40),
    ]
    half = row("fast", TOGETHER) | {"steps": 75}
    comparison = figures.compare(records, half, TOGETHER)
    assert (comparison.baseline, comparison.share) == ("vanilla, one function", 50 / 150)
    assert comparison.ahead == pytest.approx(0.05)
    assert {r["method"] for r in work.rows([PAIR], METHODS, 75, None)} == set(OURS)


def test_the_better_rate_is_chosen_by_the_first_seed():
    records = [
        record("vanilla", TOGETHER, 0.6, 0.4, lr=3e-4),
        record("vanilla", TOGETHER, 0.7, 0.4, lr=1e-3),
        record("vanilla", TOGETHER, 0.9, 0.4, lr=3e-4, seed=1),
    ]
    vanilla = row("vanilla", TOGETHER)
    assert work.better_rate(records, vanilla) == 1e-3
    assert [s["lr"] for s in work.settings(records, vanilla, seed=1)] == [1e-3]
    assert [s["lr"] for s in work.settings(records, vanilla, seed=0)] == [3e-4, 1e-3]
    longer = vanilla | {"steps": 400}
    assert [s["lr"] for s in work.settings(records, longer, seed=0)] == [1e-3]
    assert work.settings(records[:1], longer, seed=0) == []


def test_the_line_of_wise_ft_is_read_at_the_source_accuracy_of_fast():
    line = [(0.0, 0.3, 0.9), (0.5, 0.6, 0.8), (1.0, 0.8, 0.4)]
    assert best_target(line, 0.85) == pytest.approx(0.45)  # half way between the first two
    assert best_target(line, 0.6) == pytest.approx(0.7)
    assert best_target(line, 0.1) == 0.8
    assert best_target(line, 0.95) is None
    records = [
        ours(TOGETHER, 0.80, 0.85),
        record("lp-ft", TOGETHER, 0.79, 0.4, line=line),
    ]
    comparison = figures.compare(records, row("fast", TOGETHER), TOGETHER)
    assert comparison.wise_ft == pytest.approx(0.35)
    assert comparison.baseline == "lp-ft, one function"


def test_the_line_is_read_at_its_best_where_fast_knows_the_source_better():
    lp_ft = record("lp-ft", TOGETHER, 0.8, 0.4, line=[(0.0, 0.3, 0.9), (1.0, 0.8, 0.4)])
    assert figures.on_line(lp_ft, 0.95)["target"] == 0.3


def test_a_network_without_batch_norm_has_one_row_for_both_regimes():
    pair = "mobilenet 0.25 -> flowers"
    assert regimes_of("lp-ft", pair) == (TOGETHER,)
    assert regimes_of("lp-ft", PAIR) == (TOGETHER, SWITCHED)
    assert regimes_of("norm-only", pair) == ()
    assert [r["regime"] for r in report.judged("fast", pair, SWITCHED, 150, None)] == [TOGETHER] * 2
    assert [r["regime"] for r in report.judged("fast", PAIR, SWITCHED, 150, None)] == [SWITCHED] * 2


def test_misses_come_first_and_missing_rows_are_shown():
    records = [
        ours(TOGETHER, 0.80, 0.80),
        ours(SWITCHED, 0.80, 0.90),
        record("vanilla", TOGETHER, 0.70, 0.40),
    ]
    lines = report.report(records, [], [PAIR])
    verdicts = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")]
    judged = [v for v in verdicts if v in (report.MISS, report.MET)]
    assert judged == sorted(judged, key=[report.MISS, report.MET].index)
    assert {report.MISS, report.MET} == set(judged)
    assert any("source lost, mean" in line and report.MISS in line for line in lines)
    missing = lines[lines.index("## Missing") :]
    assert any("| lp-ft | 0 of 6 |" in line for line in missing)
    assert any("| vanilla | 1 of 6 |" in line for line in missing)


def test_the_summary_has_means_and_the_worst_pair():
    other = "resnet20 -> letters"
    records = [
        ours(TOGETHER, 0.80, 0.89),
        record("vanilla", TOGETHER, 0.70, 0.40),
        ours(TOGETHER, 0.60, 0.85, pair=other),
        record("vanilla", TOGETHER, 0.64, 0.60, pair=other),
    ]
    compared = report.comparisons(records, [PAIR, other])
    (line,) = report.summary(compared, [], None)
    assert line == {
        "method": "fast",
        "regime": "one function",
        "source inputs": "without",
        "pairs": 2,
        "target minus the best baseline's": "+3.0 (-4.0)",
        "source lost": "3.0 (5.0)",
        "by that baseline": "40.0 (50.0)",
        "time of a call / LP-FT's": "-",
    }
    assert report.summary(compared, [], 10) == []


def test_the_rows_of_a_pair_stand_side_by_side():
    records = [
        ours(TOGETHER, 0.80, 0.89),
        ours(SWITCHED, 0.82, 0.88),
        ours(SWITCHED, 0.84, 0.90, seed=1),
        record("adapter", SWITCHED, 0.9, 0.9, lr=None),
        record("vanilla", TOGETHER, 0.70, 0.40),
        record("lp-ft", SWITCHED, 0.81, 0.60),
        record("replay", SWITCHED, 0.99, 0.60, inputs=True),
    ]
    compared = report.comparisons(records, [PAIR])
    (line,) = report.side_by_side(records, compared, [PAIR])
    assert line["fast, one function"] == "80.0, 1.0 [1]"
    assert line["fast, two functions"] == "83.0, 1.0 [2]"
    assert line["fast, one function, source inputs"] == "-"
    assert line["adapter"] == "90.0, 0.0 [1]"
    assert line["best baseline"] == "81.0, 30.0 (lp-ft, two functions)"


def test_a_table_of_nothing_has_no_verdicts():
    lines = report.report([], [], [PAIR])
    assert not any(line.startswith(("| **miss**", "| met |")) for line in lines)


def test_few_samples_are_drawn_of_each_class():
    labels = torch.tensor([0] * 30 + [1] * 3 + [2] * 12)
    rows = few(labels, 10, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [10, 3, 10]
    assert len(rows.unique()) == len(rows)
    assert rows.tolist() == few(labels, 10, seed=0).tolist()
    assert rows.tolist() != few(labels, 10, seed=1).tolist()


def test_what_is_measured_is_the_same_in_every_run_and_of_all_classes():
    labels = torch.arange(10).repeat_interleave(100)
    x, y = some((torch.arange(1000), labels), 500)
    assert labels[x].equal(y)
    assert len(y.unique()) == 10
    assert x.equal(some((torch.arange(1000), labels), 500)[0])


def test_spd_projects_only_where_descent_leads_back():
    away, back = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = AdamSPD([{"params": [away, back], "name": "backbone"}], lr=0.1, decay=1.0)
    # Adam's first step is lr times the sign of the gradient: both go from 0 to (0.1, 0.1).
    for p in (away, back):
        p.grad = torch.tensor([-1.0, -1.0])
    optimizer.step()
    assert torch.allclose(away, torch.tensor([0.1, 0.1]))
    # A gradient along `w - w0` leads back, but momentum still carries the weights on:
    # exp_avg = 0.9 * -0.1 + 0.1 * 0.1 = -0.08, bias 0.19; exp_avg_sq = 0.001 * (0.999 * 1 + 0.01),
    # bias 0.001999.
    away.grad, back.grad = torch.tensor([-0.1, -0.1]), torch.tensor([0.1, 0.1])
    optimizer.step()
    mean, variance = -0.08 / 0.19, 0.001 * (0.999 + 0.01) / 0.001999
    plain = 0.1 - 0.1 * mean / (variance**0.5 + 1e-8)
    assert plain > 0.1
    ratio = (plain - 0.1) / plain
    assert torch.allclose(back, torch.full((2,), plain - ratio * plain), atol=1e-6)
    mean = -0.1 / 0.19  # exp_avg = 0.9 * -0.1 + 0.1 * -0.1
    assert torch.allclose(away, torch.full((2,), 0.1 - 0.1 * mean / variance**0.5), atol=1e-6)


def test_spd_leaves_the_head_to_adam():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    spd = AdamSPD([{"params": weights[:1], "name": "head"}], lr=0.1)
    adam = torch.optim.Adam(weights[1:], lr=0.1)
    for gradient in (1.0, -0.5, 0.25):
        for p, optimizer in zip(weights, (spd, adam), strict=True):
            p.grad = torch.full((3,), gradient)
            optimizer.step()
    assert torch.allclose(*weights)


def test_every_method_is_known_to_the_work():
    assert {r["method"] for r in work.rows([PAIR], METHODS, 150, None)} == set(METHODS)


def test_few_methods_run_longer_and_on_few_samples():
    few_samples = {r["method"] for r in work.rows([PAIR], METHODS, 150, 10)}
    assert few_samples == {"fast", "synthetic", "adapter", "lp-ft", "linear probe", "lora"}
    longer = {r["method"] for r in work.rows([PAIR], METHODS, 400, None)}
    assert longer == few_samples - {"linear probe"}  # which has no steps
