"""Kernel tests are written once and run on every backend that is there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fastkernels.backends import triton
from fastkernels.op import ENVIRONMENT, explain


def _backends_on_cpu() -> list[str]:
    """Triton's kernels too under TRITON_INTERPRET=1; tests/kernels/test_triton.py asks for it."""
    return ["reference", "native", *(["triton"] if triton.interpreting() else [])]


@pytest.fixture(params=_backends_on_cpu())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend that every op of the test is forced to."""
    name: str = request.param
    for row in explain():
        if row.backend == name and row.device == "cpu" and not row.available:
            pytest.skip(f"{name}: {row.reason}")
    if name == "triton":  # the interpreter is numpy, which warns where IEEE arithmetic is meant
        request.getfixturevalue("_quiet_numpy")
    monkeypatch.setenv(ENVIRONMENT, name)
    return name


@pytest.fixture
def _quiet_numpy() -> Iterator[None]:
    before = np.seterr(all="ignore")
    yield
    np.seterr(**before)
