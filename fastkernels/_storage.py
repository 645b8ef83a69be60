"""How state is stored in few bytes, in plain torch: the truth for csrc/include/fast/numeric.h.

* bfloat16, rounded to nearest, or stochastically by a hash of (seed, step, index): a second moment
  that decays by 0.1 % per step is never changed by rounding to nearest.
* 8-bit codes, a byte per element and a float32 scale per CODE_BLOCK elements along the storage, of
  y = |x| / scale. An unsigned code counts eighths of an octave of y + 1, over 32 octaves: linear
  near zero, logarithmic above. A signed one (sign in the high bit) is finest where a momentum is
  largest: from 9/80 of the block's largest value on it counts steps of 1/80 of that value, and
  below quarters of an octave, over 14 octaves. Relative error of normal data: 1.0 %.
* A bfloat16 parameter and the 16 bits it differs by from its float32 value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastkernels._update import CODE_BLOCK

_ONE = 0x3F800000
_TOP = {False: 1.875 * 2.0**31 - 1, True: 80.0}  # y of the largest code
_FLAT, _FINE, _SHIFT, _KNEE = 9.0, 16383 / 9, 47, 56  # numeric.h's kSigned...
_LEAST_SCALE = 2.0**-126  # keeps scales and their inverses finite


def flat(t: Tensor) -> Tensor:
    """`t` in the order of its storage; `t` must be dense and not overlap itself."""
    return t.as_strided((t.numel(),), (1,))


def _mix32(x: Tensor) -> Tensor:
    """A bijective mix of 32 bits (Wellons' "lowbias32") on int64 tensors."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def draws(count: int, seed: int, step: Tensor) -> Tensor:
    """int64 `[count]` below 2^32: the rounding draws of a tensor at `step`."""
    device = step.device
    index = torch.arange(count, device=device)
    low, high = (torch.tensor(seed >> s & 0xFFFFFFFF, device=device) for s in (0, 32))
    key = _mix32(_mix32(low ^ _mix32(high)) ^ step.long())
    return _mix32((index & 0xFFFFFFFF) ^ _mix32(key ^ (index >> 32)))


def _bits(x: Tensor) -> Tensor:
    return x.float().view(torch.int32).long() & 0xFFFFFFFF


def _from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def round_bf16(x: Tensor, random: Tensor) -> Tensor:
    """`x` in bfloat16, up with the probability of the part cut off; `random` below 2^16."""
    rounded = ((_bits(x) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.full_like(rounded, torch.nan), rounded)


def code_scales(count: int) -> int:
    """Number of scales of a tensor of `count` elements."""
    return -(-count // CODE_BLOCK)


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """float32 `[n]` from uint8 `[n]` and float32 `[ceil(n / CODE_BLOCK)]`."""
    code = codes.long()
    if signed:
        size = code & 0x7F
        fine = (_from_bits((size << 21) + _ONE) - 1) * (1 / _FINE)
        y = torch.where(size < _KNEE, fine, (size - _SHIFT).float())
    else:
        y = _from_bits((code << 20) + _ONE) - 1
    y = y * scales.repeat_interleave(CODE_BLOCK)[: codes.numel()]
    return torch.where(code >= 128, -y, y) if signed else y


def decode_format_1(codes: Tensor, scales: Tensor) -> Tensor:
    """As `decode`, of signed codes as they were in the first format: eighths of an octave of y + 1,
    over 16 octaves."""
    code = codes.long()
    y = _from_bits(((code & 0x7F) << 20) + _ONE) - 1
    y = y * scales.repeat_interleave(CODE_BLOCK)[: codes.numel()]
    return torch.where(code >= 128, -y, y)


def encode(x: Tensor, random: Tensor | int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a flat tensor; `random` below 2^20, or 2^19 to round to nearest."""
    blocks = functional.pad(x.float().abs(), (0, -x.numel() % CODE_BLOCK)).view(-1, CODE_BLOCK)
    largest = blocks.nan_to_num(0.0, torch.inf).amax(1) if x.numel() else blocks.sum(1)
    scales = largest / torch.tensor(_TOP[signed], dtype=torch.float32)
    scales = torch.where(largest > 0, scales.clamp(min=_LEAST_SCALE), 0.0)
    inverse = (_TOP[signed] / largest).clamp(max=1 / _LEAST_SCALE)
    y = (x.float().abs() * inverse.repeat_interleave(CODE_BLOCK)[: x.numel()]).nan_to_num(0.0)
    if signed:
        y = y.clamp(max=_TOP[True])
        fine, flat = _bits(y * _FINE + 1) - _ONE, (y * 2.0**21).long() + (_SHIFT << 21)
        code = (torch.where(y < _FLAT, fine, flat) + 2 * random) >> 21
        code = code | (_bits(x) >> 24 & 0x80)
    else:
        code = ((_bits(y + 1) - _ONE + random) >> 20).clamp(max=255)
        # A second moment is divided by: above zero it never becomes zero.
        code = torch.where((code == 0) & (x > 0), 1, code)
    # A block with anything not finite becomes NaN as a whole.
    return code.to(torch.uint8), scales + (blocks * 0).sum(1)


def load(stored: Tensor, scales: Tensor | None, *, signed: bool) -> Tensor:
    return stored if scales is None else decode(stored, scales, signed=signed)


def store(
    target: Tensor,
    scales: Tensor | None,
    value: Tensor,
    draws: Callable[[], Tensor],
    *,
    signed: bool,
) -> list[tuple[Tensor, Tensor]]:
    """(tensor, what goes into it). First moments are signed; second moments are not."""
    if scales is not None:
        random = draws()
        random = random >> 12 if signed else (random & 0xFFFF) << 4
        codes, new_scales = encode(value, random, signed=signed)
        return [(target, codes), (scales, new_scales)]
    if target.dtype == torch.bfloat16 and not signed:
        return [(target, round_bf16(value, draws() & 0xFFFF))]
    return [(target, value)]


def load_param(param: Tensor, remainder: Tensor | None) -> Tensor:
    """The float32 value of a bfloat16 parameter and its remainder; `param` without one."""
    if remainder is None:
        return param
    high, low = param.view(torch.int16).long() & 0xFFFF, remainder.long()
    # A zero with a negative remainder was written by somebody else; it would become a NaN.
    low = torch.where((high & 0x7FFF) == 0, low.clamp(min=0), low)
    return _from_bits((high << 16) + low)


def store_param(
    param: Tensor, remainder: Tensor | None, value: Tensor
) -> list[tuple[Tensor, Tensor]]:
    if remainder is None:
        return [(param, value)]
    bits = torch.where(value.isnan(), 0x7FC00000, _bits(value))
    high = ((bits + 0x8000) >> 16) & 0xFFFF
    low = (bits - (high << 16)).to(torch.int16)
    return [(param, high.to(torch.int16).view(torch.bfloat16)), (remainder, low)]
