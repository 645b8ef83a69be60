"""Hooks of mkdocs.yml: what the site shows of files outside docs/, and of notebooks.

A link from a page to a file of the repository leads to a page of that file, so that pages read
alike here, on a web site of the repository, and in the built site, which needs no address. Only
what is linked gets such a page.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
# Pages of the site that are files elsewhere.
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cuh": "cpp", ".cu": "cuda"}
# What a page of the site is in the repository, by its place in the site.
ORIGINS: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and all that is linked from any page."""
    ORIGINS.clear()
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        origin = DOCS + notebook.src_uri
        _add(files, config, place(origin), origin, notebook_page(ROOT / origin))
    ORIGINS.update({f.src_uri: DOCS + f.src_uri for f in files if f.src_uri not in ORIGINS})
    waiting = list(ELSEWHERE)
    for uri in [uri for uri in ORIGINS if uri.endswith(".md")]:
        waiting += [path for path, _ in linked(ORIGINS[uri], text_of(ORIGINS[uri]))]
    while waiting:
        origin = waiting.pop()
        if place(origin) not in ORIGINS and not origin.startswith(DOCS):
            text = text_of(origin)
            _add(files, config, place(origin), origin, text)
            waiting += [path for path, _ in linked(origin, text)]
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links to files of the repository lead to their pages."""
    here = page.file.src_uri
    origin = ORIGINS[here]
    if not origin.endswith((".md", ".ipynb")):
        return markdown

    def moved(path: str) -> str:
        return posixpath.relpath(place(path), posixpath.dirname(here) or ".")

    return relink(origin, markdown, moved)


def place(origin: str) -> str:
    """The page of the site that shows a file of the repository."""
    if origin in ELSEWHERE:
        return ELSEWHERE[origin]
    if origin.startswith(DOCS):
        return re.sub(r"\.ipynb$", ".md", origin.removeprefix(DOCS))
    if origin.startswith("benchmarks/") and origin.endswith(".md"):
        return origin
    return f"source/{origin}.md"


def linked(origin: str, text: str) -> Iterator[tuple[str, str]]:
    """The files of the repository that a text in the file `origin` links to, with the links."""
    for match in LINK.finditer(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        if origin.endswith((".md", ".ipynb")) and (ROOT / path).exists():
            yield path, match[1]


def relink(origin: str, text: str, moved: Callable[[str], str]) -> str:
    """The text with each link to a file of the repository replaced by `moved(file)`."""
    new = {link: moved(path) for path, link in linked(origin, text)}
    return LINK.sub(lambda m: f"]({new.get(m[1], m[1])}{m[2] or ''})", text)


def text_of(origin: str) -> str:
    """A file of the repository as Markdown: a page as it is, code as a block, a folder's list."""
    path = ROOT / origin
    if path.suffix == ".ipynb":
        return notebook_page(path)
    if path.suffix == ".md":
        return path.read_text()
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if not p.name.startswith(("_", ".")))
        return f"# {origin}/\n\n" + "".join(f"* `{name}`\n" for name in names)
    return f"# {origin}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}````\n"


def notebook_page(path: Path) -> str:
    """The cells of a notebook, which is kept without outputs, as Markdown."""
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    blocks = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    title, *rest = blocks
    download = f"[Download the notebook]({path.name}){{ download }}"
    return "\n\n".join([title, download, *rest]) + "\n"


def _add(files: Files, config: MkDocsConfig, uri: str, origin: str, text: str) -> None:
    ORIGINS[uri] = origin
    files.append(File.generated(config, uri, content=text))
