"""Names from strangers, in messages of one line."""

import pytest

from fast.errors import first_line, printable, some


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2Jcat", r"\x1b[2Jcat"),
        ("a\nfast: error: b", r"a\nfast: error: b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff", r"\udcff"),
        ("Käse 猫", "Käse 猫"),
    ],
)
def test_printable(name, shown):
    assert printable(name) == shown


def test_styles_of_libraries_are_dropped():
    assert first_line(ValueError("\n\x1b[1mbold\x1b[0m words\nmore")) == "bold words"


def test_some():
    assert some(["a", "b"]) == "a, b"
    assert some(["a", "b\n", "c", "d"]) == r"a, b\n, c and 1 more"
