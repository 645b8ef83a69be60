"""Imports point one way, and light imports stay light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers import ROOT, run_python

# Each layer may import itself and those before it.
LAYERS = (
    ("fastkernels", "fast.errors", "fast.files", "fast.profiling"),
    ("fast.data",),
    ("fast.heads",),
    ("fast.optim", "fast.curvature", "fast.models"),
    ("fast.adapt",),
    ("fast.train",),
    ("fast.analysis",),
    ("fast.cli",),
)
FOLDERS = {"fastkernels": ROOT / "fastkernels", "fast": ROOT / "python" / "fast"}


def rank(module: str) -> int | None:
    """The layer of `module`; None for what is in none of them."""
    for i, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return i
    return None


def imports(file: Path, module: str) -> set[str]:
    """Absolute names of everything `file` imports, lazily or not."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{parent}.{base}".rstrip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    found = {}
    for root, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [root, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def test_every_module_is_in_a_layer():
    outside = {m for m in modules() if rank(m) is None}
    assert outside <= {"fast", "fast.__main__"}, "give it a layer in LAYERS"


@pytest.mark.parametrize("module", [m for m in modules() if rank(m) is not None])
def test_imports_point_one_way(module):
    own = rank(module)
    for name in imports(modules()[module], module):
        other = rank(name)
        assert other is None or other <= own, f"{module} imports {name}"
        if own == 0:
            assert name.split(".")[0] != "fast", f"{module} imports {name}"


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


def test_native_layer_knows_no_torch():
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = file.read_text()
            assert "torch/" not in text, file
            assert "pybind11" not in text or file.name == "bindings.cpp", file
