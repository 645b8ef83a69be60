"""`pytest --benchmark` runs the benchmarks and nothing else; `pytest` runs the tests.

The flag has to live in the root conftest: pytest reads only that one before it parses the options.
"""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="run benchmarks/ and nothing else")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        config.option.benchmark_only = True
    if config.getoption("benchmark_only", False) and not config.option.file_or_dir:
        config.args[:] = [str(BENCHMARKS)]
