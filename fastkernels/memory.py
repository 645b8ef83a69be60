"""Check the memory of the tensors of a call: there is enough of it, kernels can address it, and no
element of a tensor that is written is another element as well, of this tensor or of another.

Kernels work on addresses, in any order and in parallel, so such an element would get one of several
values. Every backend refuses a tensor that breaks a rule before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The range of bytes `[begin, end)` that holds the elements of a tensor."""

    begin: int
    end: int
    what: str
    tensor: Tensor
    written: bool


def check(op: str, tensors: Iterable[tuple[str, Tensor, bool]]) -> None:
    """Check (name, tensor, whether it is written) of every tensor of a call of `op`.

    Raises:
        ValueError: a storage is too small, an address is misaligned, a tensor that is written is an
            inference tensor, overlaps itself or shares elements with another one; the message names
            them.
    """
    spans = [_span(f"{op}: {what}", t, written) for what, t, written in tensors if t.numel()]
    open_reads: list[Span] = []
    open_writes: list[Span] = []
    for span in sorted(spans, key=lambda span: span.begin):
        open_writes = [s for s in open_writes if s.end > span.begin]
        if span.written:
            open_reads = [s for s in open_reads if s.end > span.begin]
        for other in open_writes + open_reads if span.written else open_writes:
            if _share_elements(span.tensor, other.tensor):
                first, second = sorted((span.what, other.what))
                raise ValueError(
                    f"{first} and {second.removeprefix(f'{op}: ')} share memory, and one of them "
                    "is written to; give one of them once, or its .clone()"
                )
        (open_writes if span.written else open_reads).append(span)


def is_dense(t: Tensor) -> bool:
    """Whether `t` fills its storage range without gaps and without overlap."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _span(what: str, t: Tensor, written: bool) -> Span:
    width = t.element_size()
    reach = t.numel()
    if not t.is_contiguous():
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    need, have = (t.storage_offset() + reach) * width, t.untyped_storage().nbytes()
    if have < need:
        raise ValueError(
            f"{what} needs {need} bytes of its storage, which has {have}: it was resized; "
            "make the tensor anew"
        )
    begin = t.data_ptr()
    if begin % width:
        raise ValueError(
            f"{what} begins at an address that is no multiple of its {width} bytes per element "
            "(a view into a byte buffer?); give its .clone()"
        )
    if t.is_neg():
        raise ValueError(f"{what} is a negative view; give its .resolve_neg()")
    if written and t.is_inference():
        raise ValueError(
            f"{what} is an inference tensor, which may not be written to; give its .clone(), made "
            "outside of torch.inference_mode()"
        )
    if written and not t.is_contiguous() and _overlaps_itself(t):
        raise ValueError(
            f"{what} is written to, and several of its elements are one in memory (it is expanded, "
            "or made by as_strided); give its .clone()"
        )
    return Span(begin, begin + reach * width, what, t, written)


def _overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of `t`, which has some, are at one address."""
    reach = 0  # of the dimensions so far: their elements are at most so far apart
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride == 0:
            return True
        if stride <= reach:
            cells = _cells(t, t.element_size())
            return bool(cells.unique().numel() < cells.numel())
        reach += (size - 1) * stride
    return False


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether tensors whose ranges overlap share a byte; two columns of a matrix do not."""
    if is_dense(a) and is_dense(b):
        return True
    cell = min(a.element_size(), b.element_size())
    return bool(torch.isin(_cells(a, cell), _cells(b, cell)).any())


def _cells(t: Tensor, cell: int) -> Tensor:
    """int64 `[numel * bytes per element / cell]`: the elements of `t` in units of `cell` bytes."""
    at = torch.tensor([t.data_ptr() // cell], device="cpu")
    width = t.element_size() // cell
    for size, stride in zip((*t.shape, width), (*(s * width for s in t.stride()), 1), strict=True):
        at = (at[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    return at
