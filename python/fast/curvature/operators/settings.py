"""How the products of a network operator are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from fast.curvature.algorithms.arguments import check_whole
from fast.curvature.products.precision import GEMMS

METHODS = ("auto", "loop", "folded")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `NetworkOperator`, which documents them; checked when they are made."""

    reduction: str = "mean"
    method: str = "auto"
    chunk: int | str = "auto"
    memory_budget: int | None = None
    cache: bool = True
    compile: bool = False
    gemm: str | None = None
    process_group: dist.ProcessGroup | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        chunk, budget = self.chunk, self.memory_budget
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}; got {self.method!r}")
        if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
            raise ValueError(f"chunk must be 'auto' or a positive number of vectors; got {chunk!r}")
        if self.gemm not in GEMMS:
            raise ValueError(f"gemm must be one of {GEMMS}; got {self.gemm!r}")
        if budget is not None and not (isinstance(budget, int) and budget >= 1):
            raise ValueError(f"memory_budget must be a number of bytes; got {budget!r}")
        check_whole(seed=self.seed)
