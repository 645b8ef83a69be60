"""A small network that knows a task, for the tests of what is kept of it."""

from __future__ import annotations

import logging

import pytest

from networks import images, taught


@pytest.fixture(scope="session")
def pretrained():
    """Knows 5 places of a bright blob; not to be changed."""
    return taught(*images(300, 5, seed=3), rounds=20)


@pytest.fixture
def log(caplog, monkeypatch):
    """What a run says, which `fast.train` keeps from the root logger."""
    monkeypatch.setattr(logging.getLogger("fast"), "propagate", True)
    caplog.set_level(logging.INFO, "fast")
    return caplog
