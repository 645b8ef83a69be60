"""Compact storage: what the codes hold, that rounding is unbiased, and that backends agree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastkernels import codes as codec
from kernels.cases import CHUNK, Feature
from kernels.update_harness import Run


@pytest.mark.parametrize("signed", [False, True])
def test_codes_hold_the_range(signed):
    low = -9 if signed else -18
    x = torch.logspace(low / 2, 0, 128, dtype=torch.float32)
    x = torch.cat([x, -x]) if signed else x
    codes, scales = codec.encode(x, codec.NEAREST, signed=signed)
    back = codec.decode(codes, scales, signed=signed)
    # Half of an eighth of an octave, absolute near zero; signed ones have quarters of an octave,
    # and steps of 1/80 of the largest value from 9/80 of it on.
    bound = x.abs() / 16 * 1.01 + scales.repeat_interleave(128) / 16
    if signed:
        bound = torch.where(
            x.abs() < 9 / 80, x.abs() / 8 * 1.01 + 1e-6, torch.tensor(1 / 160 * 1.01)
        )
    assert ((back - x).abs() <= bound).all()
    again, scales_again = codec.encode(back, codec.NEAREST, signed=signed)
    assert torch.equal(again, codes)
    torch.testing.assert_close(scales_again, scales)


@pytest.mark.parametrize("signed", [False, True])
def test_codes_of_zeros_of_nothing_and_of_what_is_not_finite(signed):
    for x in (torch.zeros(5), torch.zeros(0)):
        codes, scales = codec.encode(x, codec.NEAREST, signed=signed)
        assert torch.equal(codec.decode(codes, scales, signed=signed), x)
    codes, scales = codec.encode(torch.tensor([1.0, torch.nan]), codec.NEAREST, signed=signed)
    assert codec.decode(codes, scales, signed=signed).isnan().all()


@pytest.mark.parametrize("signed", [False, True])
def test_codes_of_values_whose_inverse_no_float_holds(backend, signed):
    """A zero beside a denormal stays zero, on every backend."""
    x = torch.tensor([0.0, 1e-38, 1e-40])
    codes, scales = codec.encode(x, codec.NEAREST, signed=signed)
    torch.testing.assert_close(codec.decode(codes, scales, signed=signed)[:2], x[:2])
    run = Run("adamw", [torch.zeros(3)], Feature(), moment_dtypes=(torch.uint8, torch.uint8))
    run.step([x * 1e19])
    assert run.moments[not signed][0][0] == 0
    assert run.moments[not signed][0][1] > 0


def test_flat_follows_the_storage_and_refuses_gaps():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    back = torch.empty_like(x)
    codec.flat(back).copy_(codec.flat(x))
    assert torch.equal(back, x)
    for strided in (torch.ones(10)[::2], torch.ones(1).expand(3), torch.ones(4, 6)[:, :5]):
        with pytest.raises(ValueError, match="has gaps or overlaps itself"):
            codec.flat(strided)


def test_codes_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x must be \[n\]; got \[4, 32\]"):
        codec.encode(torch.ones(4, 32), codec.NEAREST, signed=True)
    codes, scales = codec.encode(torch.ones(300), codec.NEAREST, signed=True)
    for wrong in (scales[:1], scales.repeat(2)):
        with pytest.raises(ValueError, match="300 codes have 3 scales; got"):
            codec.decode(codes, wrong, signed=True)


def momentum_errors(backend: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(what an 8-bit momentum holds, what it should) of 40 steps with gradients of 0.01; the truth
    goes on from what is held, as in bitsandbytes' tests."""
    run = Run("sgd", [torch.zeros(32768)], Feature(), moment_dtypes=(torch.uint8, None))
    truth = torch.zeros(32768)
    for _ in range(40 if backend == "native" else 8):
        g = 0.01 * torch.randn(32768)
        run.step([g])
        held = codec.decode(run.moments[0][0], run.scales[0][0], signed=True)
        yield held, (0.9 * truth + g if run.steps[0] > 1 else g)
        truth = held


def test_momentum_is_as_exact_as_bitsandbytes(backend):
    """At most 20 of 32768 entries may be off by more than 3e-3 + 1e-3 |m|."""
    for held, truth in momentum_errors(backend):
        assert ((held - truth).abs() > 3e-3 + 1e-3 * truth.abs()).sum() <= 20


@pytest.mark.parametrize(
    ("kind", "bound"),
    [(torch.randn, 0.0108), (torch.rand, 0.007), (lambda n: torch.randn(n) ** 3, 0.015)],
    ids=["normal", "uniform", "cubed"],
)
def test_momentum_keeps_its_relative_error(kind, bound):
    x = kind(1 << 16)
    back = codec.decode(*codec.encode(x, codec.NEAREST, signed=True), signed=True)
    assert (back - x).norm() / x.norm() < bound


def test_a_second_moment_never_becomes_zero():
    x = torch.tensor([1.0, 1e-30])
    codes, scales = codec.encode(x, 0, signed=False)
    assert (codec.decode(codes, scales, signed=False) > 0).all()


def test_draws_are_uniform_and_differ_by_step_and_seed():
    step = torch.tensor(1.0)
    draws = codec.draws(1 << 16, 0, step).double() / 2**32
    for bits in (draws, (draws * 2**16) % 1):
        counts = torch.histc(bits, 64, 0, 1)
        assert ((counts - 1024).square() / 1024).sum() < 120  # 63 degrees of freedom, p = 1e-5
    for other in (codec.draws(1 << 16, 1, step), codec.draws(1 << 16, 0, step + 1)):
        correlation = torch.corrcoef(torch.stack([draws, other.double()]))[0, 1]
        assert correlation.abs() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_second_moment_decays(backend, dtype):
    """After a tenfold drop of the gradient; rounded to nearest, sqrt(v) is 3.4 times too large."""
    torch.manual_seed(0)
    size = 2048
    compact = Run("adamw", [torch.zeros(size)], Feature(), moment_dtypes=(None, dtype))
    exact = Run("adamw", [torch.zeros(size)], Feature())
    steps = 1200 if backend == "native" else 300
    for i in range(steps):
        g = torch.randn(size) * (1.0 if i < steps // 4 else 0.1)
        compact.step([g])
        exact.step([g])
    v = compact.moments[1][0]
    if dtype == torch.uint8:
        v = codec.decode(v, compact.scales[1][0], signed=False)
    ratio = v.float().sqrt().mean() / exact.moments[1][0].sqrt().mean()
    assert ratio.item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.bfloat16), (torch.uint8, torch.uint8)],
    ids=["bfloat16", "codes"],
)
def test_backends_store_the_same(monkeypatch, backend, dtypes):
    """One step from zero moments: the same draws, so the same bits but for ties of rounding."""
    if backend == "reference":
        pytest.skip("the others are compared with it")
    size = CHUNK + 300
    stored = []
    for name in ("reference", backend):
        monkeypatch.setenv("FASTKERNELS_BACKEND", name)
        torch.manual_seed(1)
        run = Run("adamw", [torch.randn(size)], Feature(), moment_dtypes=dtypes)
        run.step([torch.randn(size)], seed=7)
        stored.append([m[0].float() for m in run.moments])
    for ours, theirs in zip(*stored, strict=True):
        assert (ours != theirs).float().mean() < 1e-3


def test_exact_bf16_parameters_follow_float32(backend):
    """With their remainders, bfloat16 parameters take steps far below their own precision."""
    torch.manual_seed(0)
    start = torch.randn(3000).bfloat16()
    grads = [torch.randn(3000) for _ in range(30)]
    exact = Run("adamw", [start.float()], Feature(anchor_decay=0.1))
    split = Run("adamw", [start.clone()], Feature(anchor_decay=0.1))
    plain = Run("adamw", [start.clone()], Feature(anchor_decay=0.1))
    split.anchors = plain.anchors = exact.anchors
    remainder = torch.zeros(3000, dtype=torch.int16)
    split.options = {"remainders": [remainder]}
    for run in (exact, split, plain):
        run.hyper[0, 0] = 1e-5
        for g in grads:
            run.step([g])
    joined = codec.load_param(split.params[0], remainder)
    torch.testing.assert_close(joined, exact.params[0], rtol=1e-6, atol=1e-7)
    assert (plain.params[0] == start).float().mean() > 0.9, "the case must need the remainders"


def test_split_keeps_every_float():
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 3.4e38, -3.4e38, 1e-45, torch.inf, -torch.inf])
    x = torch.cat([x, torch.randn(1000)])
    param, remainder = (
        torch.empty(x.shape, dtype=torch.bfloat16),
        x.new_empty(x.shape, dtype=torch.int16),
    )
    for target, value in codec.store_param(param, remainder, x):
        target.copy_(value)
    assert torch.equal(codec.load_param(param, remainder), x)
    assert (param.float() - x).abs()[9:].max() <= x[9:].abs().max() * 2**-8


def test_a_zero_that_somebody_wrote_over_an_exact_parameter(backend):
    """Its remainder is still that of the value before, and must not borrow from the sign."""
    torch.manual_seed(0)
    run = Run("adamw", [torch.randn(1000).bfloat16()], Feature())
    remainder = torch.zeros(1000, dtype=torch.int16)
    run.options = {"remainders": [remainder]}
    run.hyper[0, 0] = 1e-4
    for _ in range(3):
        run.step([torch.randn(1000)])
    assert (remainder < 0).any(), "the case must need it"
    run.params[0][:500] = 0.0
    run.params[0][500:] = -0.0
    run.step([torch.randn(1000)])
    assert run.params[0].isfinite().all()
    assert run.params[0].abs().max() < 1e-3
