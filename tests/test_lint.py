"""The project's own lint finds nothing here, and finds what it is for."""

from __future__ import annotations

import pytest

import lint


def test_the_project_breaks_no_rule():
    assert list(lint.findings()) == []


def test_circles():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}
    assert lint.circles(graph) == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("def f():\n    import fast.errors", "fast.errors"),
        ("if TYPE_CHECKING:\n    from fast.heads import pick", "fast.heads.pick"),
        ("from .codes import decode", "fast.optim.codes.decode"),
        ("from ..heads import pick", "fast.heads.pick"),
    ],
)
def test_imports_are_seen_wherever_they_stand(tmp_path, statement, name):
    file = tmp_path / "module.py"
    file.write_text(statement)
    assert name in lint.imports(file, "fast.optim.module")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# Of a row: its columns.\n", 1),
        ('def f():\n    """Of a row."""\n', 1),
        ("# One of them.\n# Offset of a row.\nx = 'Of'\n", 0),
    ],
)
def test_sentences(tmp_path, monkeypatch, text, count):
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text(text)
    assert len(list(lint.sentences(file))) == count


@pytest.mark.parametrize(
    ("decorator", "fields", "count"),
    [
        ("@dataclass", 3, 1),
        ("@dataclasses.dataclass(frozen=True)", 3, 1),
        ("@dataclass(frozen=True, kw_only=True)", 3, 0),
        ("@dataclass", 2, 0),
        ("@other", 3, 0),
    ],
)
def test_records(tmp_path, monkeypatch, decorator, fields, count):
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    file = tmp_path / "module.py"
    body = "".join(f"    x{i}: int\n" for i in range(fields))
    file.write_text(f"{decorator}\nclass Row:\n{body}    y: ClassVar[int] = 0\n")
    assert len(list(lint.records(file))) == count
