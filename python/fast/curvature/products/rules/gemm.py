"""One matrix product, by the faster of the two libraries that torch has for it on a CPU.

On x86, torch.mm calls MKL, which uses no AVX-512 on processors that Intel did not make. oneDNN,
which is part of torch as well, does: on an EPYC of 2024 (Zen 5, 512 x 1024 x 1024, one thread) it
multiplies float32 at 254 GFLOP/s, MKL at 119. Where MKL uses AVX-512 there is nothing to gain.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# With fewer multiplications, rows or columns than these, oneDNN's overhead is more than it saves.
LEAST_WORK, LEAST_SIDE = 2**21, 8


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL here, judged by the processor's name."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        names = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in names and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def preferred(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN should multiply a [m, k] and b [k, n]."""
    (m, k), n = a.shape, b.shape[1]
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and min(m, k, n) >= LEAST_SIDE
        and m * k * n >= LEAST_WORK
        and onednn_is_faster()
    )


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [m, k] times b [k, n], in float32 arithmetic by either library."""
    if not preferred(a, b):
        return torch.mm(a, b, out=out)
    # Strides with gaps send oneDNN to its reference code, a thousand times slower.
    w = b.t() if b.is_contiguous() or b.t().is_contiguous() else b.contiguous().t()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a.contiguous(), w, None, "none", [], "")
    return result if out is None else out.copy_(result)
