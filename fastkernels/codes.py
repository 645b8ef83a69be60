"""How state is stored in few bytes, in plain torch: the truth for csrc/include/fast/numeric.h.

* bfloat16, rounded to nearest, or stochastically by a hash of (seed, step, index): rounding to
  nearest would never change a second moment that decays by 0.1 % per step.
* 8-bit codes, a byte per element and a float32 scale per CODE_BLOCK elements along the storage, of
  y = |x| / scale. An unsigned code counts eighths of an octave of y + 1, over 32 octaves: linear
  near zero, logarithmic above. A signed one (sign in the high bit) is finest where a momentum is
  largest: from 9/80 of the block's largest value on it counts steps of 1/80 of that value, and
  below quarters of an octave, over 14 octaves. Relative error of normal data: 1.0 %.
* A bfloat16 parameter and its remainder: the 16 bits that it lacks of its float32 value.

Tensors here are flat, in the order of their storage (`flat`):

    codes, scales = encode(flat(x), NEAREST, signed=True)  # uint8 [n], float32 [ceil(n / 128)]
    flat(x).copy_(decode(codes, scales, signed=True))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastkernels import memory

# Elements that share one scale. These are csrc's constants, of the same names.
CODE_BLOCK = 128
ONE = 0x3F800000
UNSIGNED_TOP, SIGNED_TOP = 1.875 * 2.0**31 - 1, 80.0  # y of the largest code
SIGNED_FLAT, SIGNED_FINE, SIGNED_SHIFT, SIGNED_KNEE = 9.0, 16383 / 9, 47, 56
LEAST_SCALE = 2.0**-126  # keeps scales and their inverses finite
NEAREST = 1 << 19  # the draw with which `encode` rounds to nearest


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, and of state that is not compact."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def flat(t: Tensor) -> Tensor:
    """A view of `t`, `[n]`, in the order of its storage.

    Raises:
        ValueError: there are gaps between the elements of `t`, or some share memory.
    """
    if t.numel() and not memory.is_dense(t):
        raise ValueError(
            f"a tensor {list(t.shape)} of strides {t.stride()} has gaps or overlaps itself; give "
            "its .contiguous()"
        )
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
    """`x` in bfloat16, rounded up with the probability of the part cut off.

    Args:
        random: int64 draws below 2^16, in the shape of `x`.
    """
    high = ((_bits(x) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.full_like(high, torch.nan), high)


def code_scales(count: int) -> int:
    """Number of scales of a tensor of `count` elements."""
    return -(-count // CODE_BLOCK)


def _scale_of_each(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 `[n]`: the scale of each of `codes`."""
    if scales.numel() != code_scales(codes.numel()):
        raise ValueError(
            f"{codes.numel()} codes have {code_scales(codes.numel())} scales; got {scales.numel()}"
        )
    return scales.repeat_interleave(CODE_BLOCK)[: codes.numel()]


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """float32 `[n]` from uint8 `[n]` and float32 `[ceil(n / CODE_BLOCK)]`.

    Raises:
        ValueError: the number of scales does not fit that of the codes.
    """
    code = codes.long()
    if signed:
        size = code & 0x7F
        fine = (_from_bits((size << 21) + ONE) - 1) * (1 / SIGNED_FINE)
        y = torch.where(size < SIGNED_KNEE, fine, (size - SIGNED_SHIFT).float())
    else:
        y = _from_bits((code << 20) + ONE) - 1
    y = y * _scale_of_each(codes, scales)
    return torch.where(code >= 128, -y, y) if signed else y


def decode_format_1(codes: Tensor, scales: Tensor) -> Tensor:
    """As `decode`, for signed codes of the first format: eighths of an octave of y + 1, over 16
    octaves."""
    code = codes.long()
    y = (_from_bits(((code & 0x7F) << 20) + ONE) - 1) * _scale_of_each(codes, scales)
    return torch.where(code >= 128, -y, y)


def encode(x: Tensor, random: Tensor | int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, uint8 `[n]`, and scales, float32 `[ceil(n / CODE_BLOCK)]`, of a real `[n]`.

    A block with a value that is not finite becomes NaN as a whole.

    Args:
        random: int64 `[n]`, uniform below 2^20, to round stochastically; NEAREST to round to
            nearest.
        signed: whether `x` has signs (a momentum) or not (a second moment, a curvature).

    Raises:
        ValueError: `x` is not flat.
    """
    if x.dim() != 1:
        raise ValueError(f"x must be [n]; got {list(x.shape)}: give flat(x)")
    size = x.float().abs()
    blocks = functional.pad(size, (0, -x.numel() % CODE_BLOCK)).view(-1, CODE_BLOCK)
    largest = blocks.nan_to_num(0.0, torch.inf).amax(1) if x.numel() else blocks.sum(1)
    top = SIGNED_TOP if signed else UNSIGNED_TOP
    scales = largest / torch.tensor(top, dtype=torch.float32)
    scales = torch.where(largest > 0, scales.clamp(min=LEAST_SCALE), 0.0)
    inverse = (top / largest).clamp(max=1 / LEAST_SCALE)
    y = (size * inverse.repeat_interleave(CODE_BLOCK)[: x.numel()]).nan_to_num(0.0)
    if signed:
        y = y.clamp(max=SIGNED_TOP)
        fine = _bits(y * SIGNED_FINE + 1) - ONE
        even = (y * 2.0**21).long() + (SIGNED_SHIFT << 21)
        code = (torch.where(y < SIGNED_FLAT, fine, even) + 2 * random) >> 21
        code = code | (_bits(x) >> 24 & 0x80)
    else:
        code = ((_bits(y + 1) - ONE + random) >> 20).clamp(max=255)
        # A second moment is divided by: above zero it never becomes zero.
        code = torch.where((code == 0) & (x > 0), 1, code)
    # NaN where the block has a value that is not finite, else 0.
    return code.to(torch.uint8), scales + (blocks * 0).sum(1)


def load(values: Tensor, scales: Tensor | None, *, signed: bool) -> Tensor:
    """The numbers of a stored tensor `[n]`, of 8-bit codes when there are `scales`."""
    return values if scales is None else decode(values, scales, signed=signed)


def store(
    target: Tensor,
    scales: Tensor | None,
    value: Tensor,
    draws: Callable[[], Tensor],
    *,
    signed: bool,
) -> list[tuple[Tensor, Tensor]]:
    """What to write for `value` `[n]`: pairs of a tensor and its new content.

    Args:
        draws: makes the rounding draws, int64 `[n]` below 2^32, when they are needed.
        signed: true for first moments. Second moments are unsigned, and round stochastically in
            bfloat16.
    """
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
    # A zero with a negative remainder was written by other code; it would become a NaN.
    low = torch.where((high & 0x7FFF) == 0, low.clamp(min=0), low)
    return _from_bits((high << 16) + low)


def store_param(
    param: Tensor, remainder: Tensor | None, value: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """What to write for `value`, as `store` does; the opposite of `load_param`."""
    if remainder is None:
        return [(param, value)]
    bits = torch.where(value.isnan(), 0x7FC00000, _bits(value))
    high = ((bits + 0x8000) >> 16) & 0xFFFF
    low = (bits - (high << 16)).to(torch.int16)
    return [(param, high.to(torch.int16).view(torch.bfloat16)), (remainder, low)]
