"""Kernel tests are written once and run on every backend that is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastkernels import _backends


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Small tensors: torch's parallel regions cost more than they bring, above all under load."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _backends_on_cpu() -> list[str]:
    return ["reference", "native"]


@pytest.fixture(params=_backends_on_cpu())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend that every op of the test is forced to."""
    name: str = request.param
    for row in _backends.explain():
        if row.backend == name and row.device == "cpu" and not row.available:
            pytest.skip(f"{name}: {row.reason}")
    monkeypatch.setenv(_backends.ENVIRONMENT, name)
    return name
