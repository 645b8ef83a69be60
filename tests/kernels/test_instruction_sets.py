"""Under every instruction set: compact state has the reference's bits in every mix of dtypes, and
rows of every length the curvature of cross-entropy in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastkernels.backends import native
from helpers import run_python

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

# Two steps in which every product and sum is exact, so that only storage rounds. The first makes
# moments of gradients of few bits; the second gets them back from storage and stores them again,
# because both betas are 1, and SGD's weights show what was read.
STORAGE = """
import itertools, os, torch
from kernels.cases import Feature
from fastkernels.backends import native
from kernels.update_harness import Run

SIZES = (1, 127, 129, 512, 513, 8192 + 640 + 5)

def unaligned(t):
    return torch.cat([t[:1], t])[1:]

def stepped(backend, rule, dtype, moments):
    os.environ["FASTKERNELS_BACKEND"] = backend
    torch.manual_seed(0)
    run = Run(rule, [unaligned(torch.zeros(n, dtype=dtype)) for n in SIZES], Feature(),
              moment_dtypes=moments)
    run.moments = [[unaligned(m) for m in ms] for ms in run.moments]
    grads = [torch.randint(-127, 128, (n,)).to(dtype) * 2.0**-20 for n in SIZES]
    grads[-1][:1000] *= 2.0**10
    grads[-1][5000:5300] = 0
    first, second = ([1, 0.5, 0.5], [1, 1, 1]) if rule == "adamw" else ([1, 0, 0], [1, 1, 1])
    for step, values in enumerate((first, second)):
        run.hyper[0, :3] = torch.tensor(values, dtype=torch.float64)
        run.step([unaligned(g) for g in grads], seed=(step + 1) << 33)
    weights = run.params if rule == "sgd" else []
    return [t for ts in (weights, *run.moments, *run.scales) for t in ts]

print(native.module().cpu_instruction_set())
compared = 0
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    own = torch.float64 if dtype == torch.float64 else torch.float32
    stored = (own, torch.bfloat16, torch.uint8)
    cases = [("adamw", both) for both in itertools.product(stored, stored)]
    cases += [("sgd", (one, None)) for one in stored]
    for rule, moments in cases:
        ours, truth = (stepped(b, rule, dtype, moments) for b in ("native", "reference"))
        for a, b in zip(ours, truth, strict=True):
            assert torch.equal(a, b), (rule, dtype, moments, a.shape)
            compared += bool(a.count_nonzero())
print(compared)
"""

# Rows on both sides of a vector and of a stretch of 128; whole blocks of 16 rows, and parts.
CLASSES = """
import itertools, torch
from fastkernels import cross_entropy_hvp_, cross_entropy_quad
from fastkernels.backends import native

print(native.module().cpu_instruction_set())
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
compared = 0
for classes, rows in itertools.product([*range(1, 36), *range(126, 150)], (1, 16, 35)):
    for dtype, bound in ((torch.float32, 4e-7), (torch.float64, 2e-15)):
        u = torch.randn(2, rows, classes).to(dtype)
        p, scale = torch.randn(rows, classes).softmax(1).to(dtype), torch.rand(rows).to(dtype)
        v, w, a = u.double().clone(), p.double(), scale.double()
        product = a[:, None] * w * (v - (w * v).sum(2, keepdim=True))
        form = (a * ((w * v * v).sum(2) - (w * v).sum(2) ** 2)).sum(1)
        where = (classes, rows, dtype)
        quad = cross_entropy_quad(u, p, scale)
        assert ((quad - form).abs() < bound * (a * (w * v * v).sum(2)).sum(1)).all(), where
        cross_entropy_hvp_(u, p, scale)
        assert ((u - product).abs() <= bound * (a[:, None] * w * v.abs().amax())).all(), where
        compared += 1
print(compared)
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_rows_of_every_length(name):
    out = run_python(CLASSES, environment={"FASTKERNELS_CPU": name}).split()
    assert out[0] in ("baseline", "avx2", name)  # a processor without the best steps down
    assert int(out[1]) == 59 * 3 * 2


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_storage_has_the_bits_of_the_reference(name):
    tests = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{STORAGE}"
    out = run_python(code, environment={"FASTKERNELS_CPU": name}).split()
    assert out[0] in ("baseline", "avx2", name)  # a processor without the best steps down
    assert int(out[1]) > 500
