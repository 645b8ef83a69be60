"""The CUDA C++ update kernels without a GPU: compiled by the C++ compiler for the CPU, where a
block is 128 threads, and held to the bits of the CPU's own kernels.

Both share the formulas of csrc/include and round alike; on a GPU square roots and quotients are the
hardware's. What is tested is the rest: which kernel takes a row, where its streams begin, whole and
ragged tiles, codes and their scales, and the draws of the rounding.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import subprocess

import pytest
import torch

from fastkernels import op
from fastkernels.backends import cuda as backend
from fastkernels.backends import native
from fastkernels.ops.update import cuda
from fastkernels.ops.update.call import UpdateCall
from fastkernels.ops.update.device_plan import CHUNK, DEVICE_PLANS
from helpers import ROOT
from kernels.cases import FEATURES, Feature
from kernels.update_harness import Run

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(not native.available()[0], reason=native.available()[1]),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="products are fused by FMA of x86"
    ),
]
BF16, CODES, F32 = torch.bfloat16, torch.uint8, torch.float32
SIZES = (1, 0, 700, 1536, CHUNK + 130)


class Emulated:
    """What `fastkernels._C_cuda` says of its kernels, and the kernels for the CPU."""

    ANY_FLOAT, ANY_DOUBLE = -1, -2

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.used: list[int] = []

    def kinds(self) -> dict[tuple[bytes, bool], int]:
        table = (ctypes.c_uint8 * 6000)()
        count = self.library.cuda_kinds(table)
        rows = [bytes(table[6 * i : 6 * i + 6]) for i in range(count)]
        return {(row[:5], bool(row[5])): i for i, row in enumerate(rows)}

    def run(self, call: UpdateCall) -> None:
        """As `cuda.run`, but for the device; clips as clip_kernel, finishes as finish_kernel."""
        what = cuda.kind_of, call.seed, call.max_grad_norm
        plan, call, addresses, finish = DEVICE_PLANS.find(call, *what)
        scale = 1.0 if call.grad_scale is None else 1.0 / float(call.grad_scale)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in call.grads)) * scale
        most = call.max_grad_norm or 0.0
        assert most or scale == 1.0, "a loss scale without a limit would be read by the kernel"
        limited = scale * min(1.0, most / (norm + 1e-6))
        plan.control.copy_(torch.tensor([norm, limited, 0.0], dtype=torch.float64))
        grads = torch.tensor(addresses)
        count = plan.partial.shape[1]
        for launch in plan.launches:
            self.used.append(launch.kind)
            self.library.run_chunks(
                int(call.rule.name == "anchored_sgd_"), launch.kind, *map(
                    ctypes.c_int64, (launch.first, launch.count)),
                *(ctypes.c_void_p(t.data_ptr()) for t in (plan.rows, grads, plan.chunks)),
                ctypes.c_int64(count), *(ctypes.c_void_p(t.data_ptr()) for t in (
                    call.hyper, plan.partial, plan.control)),
                ctypes.c_void_p(call.stats.data_ptr()), ctypes.c_double(most),
                ctypes.c_uint64(call.seed),
            )  # fmt: skip
        squares, away, change, energy = plan.partial.sum(1).tolist()
        roots = [norm if most else math.sqrt(squares), math.sqrt(away), math.sqrt(change)]
        call.stats.copy_(torch.tensor([*roots, 0.5 * energy], dtype=torch.float64))
        for step in call.steps:
            step += 1
        finish()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    target = tmp_path_factory.mktemp("cuda") / "emulated.so"
    here = ROOT / "tests" / "kernels" / "cuda_on_cpu"
    folders = [here, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
    flags = ["-std=c++20", "-O1", "-mavx2", "-mfma", "-ffp-contract=off", "-pthread", "-fPIC"]
    command = [str(COMPILER), *flags, "-shared", "-Wno-unknown-pragmas"]
    command += [*(f"-I{f}" for f in folders), str(here / "emulate.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(target)


@pytest.fixture
def emulated(library, monkeypatch):
    found = Emulated(library)
    monkeypatch.setattr(backend, "module", lambda: found)
    cuda._kinds.cache_clear()
    yield found
    cuda._kinds.cache_clear()


# What is stored how: parameters and gradients, moments, anchors, curvature, and whether parameters
# have remainders; and whether a kernel was compiled for it.
FORMS = {
    "float32": (F32, F32, None, F32, F32, False, True),
    "bf16": (F32, F32, BF16, BF16, BF16, False, True),
    "codes": (F32, F32, CODES, BF16, CODES, False, True),
    "exact": (BF16, BF16, BF16, BF16, CODES, True, True),
    "exact_codes": (BF16, BF16, CODES, BF16, F32, True, True),
    "mixed": (F32, BF16, CODES, BF16, CODES, False, False),
    "half": (torch.float16, torch.float16, None, F32, BF16, False, False),
    "float64": (torch.float64, torch.float64, None, torch.float64, CODES, False, False),
}


def make(rule: str, form: tuple, feature: Feature) -> Run:
    param, gradient, moment, anchor, curvature, split, _ = form
    torch.manual_seed(0)
    params = [torch.randn(n).to(param) for n in SIZES]
    run = Run(rule, params, feature, moment_dtypes=(moment, moment))
    run.store(gradient=gradient, anchor=anchor, curvature=curvature, split=split)
    return run


def steps(run: Run, count: int = 2) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        grads = [torch.randn(n, generator=generator).to(run.gradient_dtype) for n in SIZES]
        run.step(grads, seed=2**40 + 7)


def both(emulated, monkeypatch, make_run) -> tuple[Run, Run]:
    """The same run by the emulated kernels and by those of the CPU."""
    ours, theirs = make_run(), make_run()
    choose = op.choose
    monkeypatch.setattr(op, "choose", lambda name, device: emulated.run)
    steps(ours)
    monkeypatch.setattr(op, "choose", choose)
    monkeypatch.setenv(op.ENVIRONMENT, "native")
    steps(theirs)
    return ours, theirs


def assert_same(ours: Run, theirs: Run) -> None:
    for a, b in zip(ours.outputs()[:-1], theirs.outputs()[:-1], strict=True):
        if a.dtype == torch.float64:  # the last bit of the norm depends on the order of its sum
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        else:
            assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ"
    torch.testing.assert_close(ours.stats, theirs.stats, rtol=1e-5, atol=0)


CASES = [
    pytest.param(
        rule, form, id=f"{rule}-{name}",
        marks=() if (rule, name) in (("adamw", "codes"), ("sgd", "exact")) else pytest.mark.slow,
    )
    for rule in ("adamw", "sgd")
    for name, form in FORMS.items()
]  # fmt: skip


@pytest.mark.parametrize(("rule", "form"), CASES)
def test_bits_of_the_cpu_kernels(emulated, monkeypatch, rule, form):
    feature = Feature(anchor_decay=0.5, curvature=True, weight_decay=0.1, max_grad_norm=0.5)
    assert_same(*both(emulated, monkeypatch, lambda: make(rule, form, feature)))
    assert all((kind >= 0) == form[-1] for kind in emulated.used)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["plain", "curvature"])
def test_without_a_pull_or_a_limit(emulated, monkeypatch, feature):
    made = lambda: make("adamw", FORMS["codes"], FEATURES[feature])  # noqa: E731
    assert_same(*both(emulated, monkeypatch, made))


@pytest.mark.slow
def test_unaligned_tensors_take_the_kernel_for_any(emulated, monkeypatch):
    def made() -> Run:
        run = make("adamw", FORMS["float32"], Feature(anchor_decay=0.5, curvature=True))
        run.params = [torch.cat([p.new_zeros(1), p])[1:] for p in run.params]
        return run

    assert_same(*both(emulated, monkeypatch, made))
    assert set(emulated.used) == {Emulated.ANY_FLOAT}
