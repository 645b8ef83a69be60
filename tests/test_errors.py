"""Messages show names of strangers in one line; warnings name the user's own."""

import pytest
import torch

import fast
from fast.errors import counted, first_line, import_library, printable, some
from networks import ConvNet, images


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


def test_counted():
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert counted(1, "class", "classes") == "1 class"
    assert counted(2, "row is", "rows are") == "2 rows are"


def test_a_warning_names_the_line_of_the_caller():
    """However deep in the library it arises: here in a context manager, two functions down."""
    model = ConvNet().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="too coarse") as caught:
        fast.finetune(model, images(20, 3), steps=2)
    assert [w.filename for w in caught if "too coarse" in str(w.message)] == [__file__]


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (ModuleNotFoundError("", name="peft.tuners"), None, "it needs peft: pip install peft$"),
        (
            ModuleNotFoundError("Could not import module 'Bloom'"),
            RuntimeError("operator torchvision::nms does not exist"),
            "^torchvision was compiled for another torch .* install both from the same place",
        ),
        (
            ModuleNotFoundError("Could not import module 'Bloom'"),
            None,
            r"it needs peft, which is installed but cannot be imported \(Could not import",
        ),
    ],
    ids=["missing", "another torchvision", "broken"],
)
def test_a_library_that_cannot_be_imported_is_not_called_missing(
    monkeypatch, error, cause, message
):
    def fail(name):
        raise error from cause

    monkeypatch.setattr("fast.errors.importlib.import_module", fail)
    with pytest.raises(ImportError, match=message):
        import_library("peft", "it needs")
