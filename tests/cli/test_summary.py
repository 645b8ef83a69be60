"""Several runs condensed to a row, worked out by hand."""

import pytest

from fast.cli.report.summary import NOTES, Run, settings, steps_to, summarise, verdict
from fast.cli.report.table import few_samples, html_table, percent, text_table


def run(method, seed, targets, after=None, before=0.9):
    history = [{"step": 10 * i, "target_accuracy": t} for i, t in enumerate(targets)]
    return Run(
        method=method,
        seed=seed,
        lr=1e-3,
        history=history,
        target_accuracy=targets[-1],
        source_accuracy=after,
        source_accuracy_before=after and before,
        seconds=2.0,
    )


def test_means_spreads_and_steps():
    runs = [
        run("fast", 0, [0.1, 0.6, 0.8, 0.9], after=0.88),
        run("fast", 1, [0.1, 0.9, 0.9, 0.9], after=0.86),
        run("slow", 0, [0.1, 0.3, 0.8, 0.9], after=0.88),
        run("slow", 1, [0.1, 0.3, 0.5, 0.7], after=0.86),
        run("vanilla", 0, [0.1, 0.3, 0.5, 0.7], after=0.5),
        run("vanilla", 1, [0.1, 0.3, 0.5, 0.8], after=0.3),
    ]
    header, rows = summarise(runs)
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    steps = "steps to vanilla's 75.0"
    assert table["fast"]["target"] == "90.0 ± 0.0"
    assert table["fast"]["source after"] == "87.0 ± 12.7"  # t(0.975, 1) = 12.71
    assert table["fast"]["source lost"] == "3.0 ± 12.7"
    assert table["vanilla"]["source lost"] == "50.0 ± 127.1"
    assert table["fast"][steps] == "15 (0.50)"
    assert table["slow"][steps] == "25 (0.83), 1 of 2"  # 20, and a whole run of 30
    assert table["vanilla"][steps] == "30 (1.00), 1 of 2"


def test_without_source_and_without_vanilla():
    header, rows = summarise([run("l2-sp", 0, [0.1, 0.5]), run("fast", 0, [0.1, 0.4])])
    assert header == ["method", "lr", "target", "steps to l2-sp's 50.0", "seconds"]
    assert [row[3] for row in rows] == ["10 (1.00)", "not reached"]


def test_a_little_gained_is_no_minus_zero():
    header, rows = summarise([run("fast", 0, [0.1, 0.5], after=0.9004)])
    assert rows[0][header.index("source lost")] == "0.0"


def test_steps_to_passes_over_records_without_a_target():
    history = [
        {"step": 1, "target_accuracy": None},
        {"step": 2},
        {"step": 3, "target_accuracy": 0.5},
    ]
    assert steps_to(history, 0.5) == 3
    assert steps_to(history, 0.6) is None


def test_text_table():
    assert text_table(["a", "value"], [["first", "1"], ["b", "10.5"]]).splitlines() == [
        "a      value",
        "-----  -----",
        "first      1",
        "b       10.5",
    ]


def test_html_is_escaped():
    assert "<td>&lt;b&gt;</td>" in html_table(["x"], [["<b>"]])


@pytest.mark.parametrize(("value", "text"), [(0.9171, "91.7"), (0, "0.0"), (None, "")])
def test_percent(value, text):
    assert percent(value) == text


def test_the_notes_say_what_is_not_counted_as_a_step():
    assert "head_steps, of fast), are not counted" in NOTES


def test_the_verdict_is_in_words():
    runs = [
        run("fast", 0, [0.1, 0.90], after=0.88),
        run("fast", 1, [0.1, 0.92], after=0.88),
        run("vanilla", 0, [0.1, 0.80], after=0.5),
        run("vanilla", 1, [0.1, 0.82], after=0.5),
        run("l2-sp", 0, [0.1, 0.85], after=0.88),
        run("l2-sp", 1, [0.1, 0.95], after=0.88),
    ]
    assert verdict(runs, 500) == (
        "fast learns 10.0 points more than vanilla, and keeps 38.0 points more of the source task. "
        "fast learns about as much as l2-sp (+1.0 ± 50.8 points, which is undecided), and keeps as "
        "much of the source task."
    )
    assert verdict([runs[0], runs[2]], 500).endswith(
        "There is one seed of each: another may come out differently."
    )
    assert "source" not in verdict([run("fast", 0, [0.5]), run("vanilla", 0, [0.7])], 500)


def test_the_values_that_methods_ran_with():
    one, two = run("fast", 0, [0.5]), run("vanilla", 0, [0.5])
    one.plan, two.plan = {"method": "fast", "lr": 1.5e-3}, {"method": "vanilla", "lr": 1e-3}
    assert settings([one, two]) == (["setting", "fast", "vanilla"], [["lr", "0.0015", "0.001"]])


def test_how_little_a_few_samples_say():
    assert (
        few_samples(8) == "8 samples measure an accuracy to within 18 points (one standard error)"
    )
    assert (few_samples(101), few_samples(0)[:9]) == ("", "0 samples")
    words = verdict([run("fast", 0, [0.5]), run("vanilla", 0, [0.7])], 8)
    assert words.endswith("may come out differently. " + few_samples(8) + ".")


def test_columns_of_wide_and_combining_characters():
    table = text_table(["class", "%"], [["日本", "1"], ["cafe\u0301", "2"], ["plain", "3"]])
    assert table.splitlines()[2:] == ["日本   1", "cafe\u0301   2", "plain  3"]
