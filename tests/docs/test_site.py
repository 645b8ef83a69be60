"""The site: the reference is complete, and links of pages lead to pages."""

from __future__ import annotations

import importlib
import re

import pytest

from helpers import ROOT

REFERENCE = ROOT / "docs" / "reference"


@pytest.mark.parametrize("package", ["fast", "fast.optim", "fast.curvature", "fastkernels"])
def test_the_reference_has_all_that_is_public(package):
    pages = "".join(page.read_text() for page in REFERENCE.glob("*.md"))
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", pages, re.MULTILINE)}
    assert set(importlib.import_module(package).__all__) - described == set()


@pytest.fixture
def site():
    pytest.importorskip("mkdocs", reason="the hooks are those of mkdocs")
    return importlib.import_module("docs_site")


@pytest.mark.parametrize(
    ("origin", "link", "page"),
    [
        ("docs/photos.md", "data.md", "data.md"),
        ("docs/own-loop.md", "notebooks/own-loop.ipynb", "notebooks/own-loop.md"),
        ("README.md", "docs/photos.md", "photos.md"),
        ("docs/research.md", "../benchmarks/results/tried.md", "benchmarks/results/tried.md"),
        ("docs/update.md", "../fastkernels/op.py", "source/fastkernels/op.py.md"),
        ("README.md", "fastkernels", "source/fastkernels.md"),
        ("docs/photos.md", "../CONTRIBUTING.md", "contributing.md"),
    ],
)
def test_links_to_the_repository_lead_to_pages(site, origin, link, page):
    text = f"see [this]({link}#part), [that](https://host/{link}) and `names[0](x)`"
    assert site.relink(origin, text, site.place) == text.replace(f"({link}#", f"({page}#")


def test_code_and_folders_are_shown(site):
    code = (ROOT / "fastkernels" / "op.py").read_text()
    assert site.text_of("fastkernels/op.py") == (f"# fastkernels/op.py\n\n````python\n{code}````\n")
    assert "* `op.py`\n" in site.text_of("fastkernels")


def test_a_notebook_is_shown_with_its_code(site):
    page = site.text_of("docs/notebooks/photos.ipynb")
    assert page.startswith("# A folder of photos\n")
    assert "\n```python\n!fast evaluate runs/photos\n" in page
    assert "[Download the notebook](photos.ipynb)" in page
