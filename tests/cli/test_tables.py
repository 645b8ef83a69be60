"""Tables and texts fit into a terminal of 80 columns."""

import itertools

import pytest

from fast.cli.commands.saved.predict import _table
from fast.cli.main import _parser
from fast.cli.options import parser_of
from fast.cli.report.summary import Run, summarise
from fast.cli.report.table import paragraph, shortened, text_table
from fast.cli.spec import COMMANDS


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


def widest(text):
    return max(map(len, text.splitlines()))


def test_headings_of_wide_tables_have_several_lines():
    header = ["method", *["a rather long heading", "short"] * 4]
    rows = [["fast", *["1.0", "2"] * 4]]
    lines = text_table(header, rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines[:2]] == [["a", "a"], ["rather", "rather"]]
    assert lines[-1].split() == rows[0]
    narrow = text_table(header[:3], [rows[0][:3]]).splitlines()
    assert narrow[0].split("  ")[:2] == ["method", "a rather long heading"]


def test_a_last_column_of_words_is_broken():
    reason = "something that is long " * 4
    lines = text_table(["op", "reason"], [["a" * 30, reason], ["b", "short"]], left=2).splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(line[32:] for line in lines[2:-1]).split() == reason.split()
    assert lines[3].startswith(" " * 32)


def test_a_comparison_fits():
    runs = [
        Run(
            method=method, seed=seed, lr=3e-4, seconds=1234.0,
            history=[{"step": 20, "target_accuracy": 0.9}, {"step": 100, "target_accuracy": 0.95}],
            target_accuracy=0.9 + 0.01 * seed, source_accuracy=0.5 + 0.01 * seed,
            source_accuracy_before=0.9,
        )
        for method, seed in itertools.product(("vanilla", "fast"), range(3))
    ]  # fmt: skip
    assert widest(text_table(*summarise(runs))) <= 80


def test_predictions_fit(terminal, monkeypatch):
    long = [f"a folder with a long name/{'deep/' * 20}{i}.jpg" for i in range(3)]

    class Answers:
        names = tuple(long)

        def top(self, count):
            return [[("dandelion", 0.5), ("rose", 0.3)][:count]] * 3

        def __len__(self):
            return 3

    lines = _table(Answers(), 2).splitlines()
    assert max(map(len, lines)) <= 80
    assert "/2.jpg " in lines[-1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert long[2] in _table(Answers(), 2)  # other programs get all of a name


def test_words_are_not_broken(terminal, monkeypatch):
    text = "words " * 40
    assert widest(paragraph(text)) <= 80
    assert paragraph(text).split() == text.split()
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert paragraph(text) == text
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 7) == "ab…hijk"


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = parser_of(COMMANDS[name], f"fast {name}") if name else _parser()
    text = parser.format_help()
    assert widest(text) <= 80
    assert text.startswith(f"usage: fast {name}".rstrip())
    assert "(default: )" not in text
