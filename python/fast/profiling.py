"""Named ranges for torch.profiler, free when nobody profiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


def named_range(name: str) -> AbstractContextManager[Any]:
    """`with named_range("fast::step"):` shows as a range of that name in a running profile.

    Without a profiler it costs 0.1 us; torch's own `record_function` costs some all the same.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _NOTHING
    return torch.profiler.record_function(name)
