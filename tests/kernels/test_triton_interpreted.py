"""The Triton updates in Triton's interpreter: storage forms, alignment, and tables between steps.

TRITON_INTERPRET is read when triton is imported, so tests/kernels/test_triton.py runs this file in
a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from fastkernels import codes as codec
from fastkernels.backends import triton
from fastkernels.ops.update.device_plan import DEVICE_PLANS
from kernels.cases import Feature
from kernels.update_harness import Run

pytestmark = pytest.mark.skipif(
    not triton.interpreting(), reason="needs TRITON_INTERPRET=1; run by test_triton.py"
)
BF16, CODES = torch.bfloat16, torch.uint8
FULL = Feature(
    anchor_decay=0.5, curvature=True, weight_decay=0.1, max_grad_norm=0.5, grad_scale=8.0
)
SIZES = (5, 700, 1536)


@pytest.fixture(autouse=True)
def _triton_backend(monkeypatch, _quiet_numpy):
    monkeypatch.setenv("FASTKERNELS_BACKEND", "triton")


def values(run: Run) -> list[torch.Tensor]:
    """Parameters and moments as numbers, and the stats."""
    found = [p.double() for p in run.params]
    for k, (moments, scales) in enumerate(zip(run.moments, run.scales, strict=True)):
        for i, m in enumerate(moments):
            decoded = codec.load(m.flatten(), scales[i] if scales else None, signed=k == 0)
            found.append(decoded.double())
    return [*found, *run.steps, run.stats]


def stepped(monkeypatch, backend: str, make) -> Run:
    monkeypatch.setenv("FASTKERNELS_BACKEND", backend)
    torch.manual_seed(0)
    run = make()
    for _ in range(2):
        run.step([torch.randn(p.shape).to(run.gradient_dtype) for p in run.params], seed=2**40 + 5)
    return run


FORMS = {
    "bf16_moments": ("adamw", torch.float32, torch.float32, (BF16, BF16), BF16, BF16, False),
    "codes": ("adamw", torch.float32, BF16, (CODES, CODES), BF16, CODES, False),
    "bf16_remainders": ("adamw", BF16, BF16, (BF16, CODES), BF16, torch.float32, True),
    "float64": ("adamw", torch.float64, torch.float32, (BF16, CODES), torch.float32, CODES, False),
    "half": ("adamw", torch.float16, torch.float16, (None, BF16), torch.float16, BF16, False),
    "sgd_codes": ("sgd", torch.float32, torch.float16, (CODES, None), BF16, CODES, False),
    "sgd_remainders": ("sgd", BF16, torch.float32, (BF16, None), torch.float32, BF16, True),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_storage_forms_agree_with_the_reference(monkeypatch, form):
    rule, param, gradient, moments, anchor, curvature, split = form

    def make() -> Run:
        run = Run(rule, [torch.randn(n).to(param) for n in SIZES], FULL, moment_dtypes=moments)
        run.store(gradient=gradient, anchor=anchor, curvature=curvature, split=split)
        return run

    ours, theirs = (stepped(monkeypatch, name, make) for name in ("triton", "reference"))
    for a, b in zip(values(ours), values(theirs), strict=True):
        # A stored value may fall to the other side of a rounding: rarely, and by one unit.
        close = torch.isclose(a, b, rtol=2e-5, atol=1e-6)
        assert close.double().mean() > 0.99
        torch.testing.assert_close(a, b, rtol=0.13, atol=2e-2)
    if split:
        pairs = zip(ours.options["remainders"], theirs.options["remainders"], strict=True)
        assert all((a != b).double().mean() < 0.1 for a, b in pairs)


def at_offset(t: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy of `t` that begins `offset` elements into its storage, as a bucket view does."""
    return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)


def test_unaligned_tensors_and_gradients_that_change_their_alignment():
    def make() -> Run:
        torch.manual_seed(0)
        return Run("adamw", [torch.randn(n) for n in (1030, 700)], FULL)

    plain, moved = make(), make()
    moved.params = [at_offset(p, 1) for p in moved.params]
    moved.moments[0][1] = at_offset(moved.moments[0][1], 3)
    for offset in (0, 1, 0):
        grads = [torch.randn_like(p) for p in plain.params]
        plain.step(grads)
        moved.step([at_offset(g, offset) for g in grads])
    assert all(map(torch.equal, plain.params, moved.params))


def test_one_list_of_many_kinds(monkeypatch):
    """Kinds are launched apart, but share one norm, one clip and one set of figures."""
    dtypes = [torch.float32, torch.float64, BF16, torch.float32]
    runs = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("FASTKERNELS_BACKEND", backend)
        torch.manual_seed(0)
        params = [torch.randn(300).to(d) for d in dtypes]
        runs.append(Run("adamw", params, Feature(anchor_decay=0.5, max_grad_norm=0.5)))
        runs[-1].anchors[3] = None
        runs[-1].step([torch.randn(300).to(d) for d in dtypes])
    ours, theirs = runs
    torch.testing.assert_close(ours.stats, theirs.stats, rtol=1e-5, atol=0)
    for a, b in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(a, b)
    assert [s.item() for s in ours.steps] == [1.0] * 4


def test_one_launch_for_any_number_of_tensors(monkeypatch):
    """Tensors of one kind: all of a network's, whatever their shapes."""
    found, find = [], DEVICE_PLANS.find

    def watched(*args):
        found.append(find(*args))
        return found[-1]

    monkeypatch.setattr(DEVICE_PLANS, "find", watched)
    shapes = [(64, 3, 7, 7), (64,), (), (1,), (0,), (3, 5)] * 20 + [(40000,)]
    run = Run("adamw", [torch.randn(s) for s in shapes], Feature(anchor_decay=0.5))
    run.step([torch.randn(s) for s in shapes])
    ((plan, *_),) = found
    (launch,) = plan.launches
    # A chunk of its own for each tensor that has elements, three for the last.
    assert launch.count == len([s for s in shapes if 0 not in s]) + 2
