"""The rules of CONTRIBUTING.md that a script can hold: `python .ci/lint.py` prints what breaks one.

Files and folders are small, records are built by keyword, imports make no circle, and no comment
or docstring begins with "Of".
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "python" / "fast", ROOT / "fastkernels", ROOT / "benchmarks")
# Built from csrc, so that they have no file here.
COMPILED = {"fastkernels._C", "fastkernels._C_cuda"}
DYNAMIC_IMPORTS = ("import_module", "__import__")
MOST_MODULES, MOST_LINES, MEDIAN_LINES = 12, 500, 150
# A record of one or two fields cannot be built in the wrong order unnoticed. A NamedTuple is no
# dataclass: it is for what is unpacked on arrival.
POSITIONAL_FIELDS = 2
PROSE = (tokenize.COMMENT, tokenize.STRING)


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    named = {}
    for folder in PACKAGES:
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder.parent).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imports(file: Path, module: str) -> set[str]:
    """Absolute names of all that `file` imports: in functions, for type checkers, and by
    `import_module` of a name that is written there."""
    parents = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = parents[: len(parents) - node.level + 1] + base
            names |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and called(node) in DYNAMIC_IMPORTS:
            names |= {x.value for x in node.args[:1] if isinstance(x, ast.Constant)}
    return names


def called(call: ast.Call) -> str:
    """The last name of the function that is called."""
    return ast.unparse(call.func).rpartition(".")[2]


def imports_computed_names(file: Path) -> bool:
    """Whether `file` imports modules whose names cannot be read off its source."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    return any(
        called(call) in DYNAMIC_IMPORTS
        and not (call.args and isinstance(call.args[0], ast.Constant))
        for call in calls
    )


def import_graph() -> dict[str, set[str]]:
    """The modules of the packages that each module names in an import."""
    files = modules()
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, file in files.items():
        for name in imports(file, module) - COMPILED:
            while name and name not in files:
                name = name.rpartition(".")[0]
            graph[module] |= {name} - {"", module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other: strongly connected components (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            start = stack.index(module)
            groups.append(sorted(stack[start:]))
            del stack[start:]

    for module in graph:
        if module not in index:
            visit(module)
    return [group for group in groups if len(group) > 1]


def small_files() -> Iterator[str]:
    lengths = {file: len(file.read_text().splitlines()) for file in modules().values()}
    for file, lines in lengths.items():
        if lines > MOST_LINES:
            yield f"{file.relative_to(ROOT)}: {lines} lines; at most {MOST_LINES}"
    if (middle := median(lengths.values())) >= MEDIAN_LINES:
        yield f"the median file has {middle:.0f} lines; it should be under {MEDIAN_LINES}"
    for folder in sorted({file.parent for file in lengths}):
        if (count := len(list(folder.glob("*.py")))) > MOST_MODULES:
            yield f"{folder.relative_to(ROOT)}: {count} modules; at most {MOST_MODULES}"


def records(file: Path) -> Iterator[str]:
    """Dataclasses that can be built by position, and classes named Job."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        where = f"{file.relative_to(ROOT)}:{node.lineno}"
        if node.name == "Job":
            yield f"{where}: a class named Job; say what kind"
        types = [ast.unparse(x.annotation) for x in node.body if isinstance(x, ast.AnnAssign)]
        fields = sum("ClassVar" not in annotation for annotation in types)
        decorator = " ".join(map(ast.unparse, node.decorator_list))
        by_position = "dataclass" in decorator and "kw_only=True" not in decorator
        if by_position and fields > POSITIONAL_FIELDS:
            yield f"{where}: {node.name} has {fields} fields; give it kw_only=True"


def sentences(file: Path) -> Iterator[str]:
    """Comments and docstrings that begin with "Of"."""
    lines = io.StringIO(file.read_text())
    marks: Iterable[tuple[int, str]] = enumerate(lines, 1)
    if file.suffix == ".py":
        tokens = tokenize.generate_tokens(lines.readline)
        marks = [(t.start[0], t.string) for t in tokens if t.type in PROSE]
    for line, string in marks:
        if re.match(r'\s*(#|//+|/?\*+|[a-zA-Z]?""")\s*Of\b', string):
            yield f'{file.relative_to(ROOT)}:{line}: begins with "Of"'


def findings() -> Iterator[str]:
    """What breaks a rule, one line each."""
    yield from small_files()
    for group in circles(import_graph()):
        yield f"imports make a circle: {', '.join(group)}"
    for file in modules().values():
        yield from records(file)
    native = (f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh"))
    for file in (*modules().values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted(native)):
        yield from sentences(file)


if __name__ == "__main__":
    broken = list(findings())
    print("\n".join(broken) or "no rule is broken")
    raise SystemExit(bool(broken))
