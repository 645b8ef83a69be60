"""Imports point one way, and light imports stay light."""

from __future__ import annotations

import pytest

import lint
from helpers import ROOT, run_python

# A layer may import itself and those before it.
LAYERS = (
    ("fastkernels",),
    (
        "fast.dtensor",
        "fast.errors",
        "fast.figures",
        "fast.files",
        "fast.profiling",
        "fast.progress",
        "fast.ranks",
        "fast.version",
        "fast.tensor_files",
        "fast.workers",
    ),
    ("fast.data",),
    ("fast.heads",),
    ("fast.optim", "fast.curvature", "fast.models"),
    ("fast.merge",),
    ("fast.deploy",),
    ("fast.adapt",),
    ("fast.train", "fast.integrations"),
    ("fast.analysis",),
    ("fast.cli",),
)
# Modules that compute the names of what they import, and what these are.
COMPUTED_IMPORTS = {
    "fast",  # the names of `fast.__all__`, on first use
    "fast.cli.main",  # the module of a command, of its own layer
    "fast.errors",  # optional libraries: timm, transformers, PEFT
    "fastkernels.op",  # the backends of an operation, beside it
}
MODULES = {name: file for name, file in lint.modules().items() if not name.startswith("bench")}


def layer(module: str) -> int | None:
    """The layer of `module`; None if it is in none of them."""
    for i, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return i
    return None


def test_every_module_is_in_a_layer():
    outside = {module for module in MODULES if layer(module) is None}
    assert outside <= {"fast", "fast.__main__"}, "give it a layer in LAYERS"


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) is not None])
def test_imports_point_one_way(module):
    here = layer(module)
    for name in lint.imports(MODULES[module], module):
        other = layer(name)
        assert other is None or other <= here, f"{module} imports {name}"
        if here == 0:
            assert name.split(".")[0] != "fast", f"{module} imports {name}"


def test_imports_can_be_read_off_the_source():
    """An import of a computed name could reach up a layer unseen."""
    computed = {name for name, file in MODULES.items() if lint.imports_computed_names(file)}
    assert computed == COMPUTED_IMPORTS


def test_imports_by_name_are_imports(tmp_path):
    file = tmp_path / "low.py"
    file.write_text("import importlib\n\ndef f():\n    importlib.import_module('fast.cli')\n")
    assert lint.imports(file, "fast.low") == {"importlib", "fast.cli"}
    assert not lint.imports_computed_names(file)
    file.write_text("from importlib import import_module\nimport_module('fast.' + 'cli')\n")
    assert lint.imports_computed_names(file)


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("fastkernels", ("fast", "matplotlib", "triton", "sklearn", "transformers", "timm")),
        ("fast.optim", ("fast.train", "fast.cli", "matplotlib", "triton", "sklearn", "timm")),
        ("fast", ("matplotlib", "sklearn", "timm", "transformers", "datasets", "tensorboard")),
    ],
)
def test_light_import(package, absent):
    code = f"import sys, {package}\nprint([m for m in {absent!r} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("name", ["curvature.audit", "heads.attach_adapters", "optim.UnfusedPull"])
def test_names_of_the_pages_need_no_import_of_their_own(name):
    assert run_python(f"import fast\nprint(callable(fast.{name}))").strip() == "True"


def test_native_layer_knows_no_torch():
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = file.read_text()
            assert "torch/" not in text, file
            assert "pybind11" not in text or file.name == "bindings.cpp", file
