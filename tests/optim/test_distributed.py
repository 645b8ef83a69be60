"""DDP, FSDP2 and torch.distributed.checkpoint, on two gloo processes; the cases: rank_cases.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from rank_cases import CASES
from ranks import run_on_ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case, tmp_path):
    run_on_ranks(case, tmp_path)
