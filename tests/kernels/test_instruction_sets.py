"""Compact state has the reference's bits under every instruction set, in every mix of dtypes."""

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


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_storage_has_the_bits_of_the_reference(name):
    tests = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{STORAGE}"
    out = run_python(code, environment={"FASTKERNELS_CPU": name}).split()
    assert out[0] in ("baseline", "avx2", name)  # a processor without the best steps down
    assert int(out[1]) > 500
