"""The Triton updates without a GPU: the suite in the interpreter, and what they compile to."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.kernels.machine_code import sass
from benchmarks.kernels.machine_code.gpu import offline
from fastkernels.backends import triton as backend
from fastkernels.ops.update.plan import DTYPES
from helpers import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_compiler = pytest.mark.skipif(
    backend.interpreting(), reason="TRITON_INTERPRET=1 replaces the compiler"
)

# All of tests/kernels takes minutes in the interpreter (TRITON_INTERPRET=1 pytest tests/kernels);
# these cover every branch of the kernels.
SELECTED = (
    "triton_interpreted or (triton and (test_stats or optional_entries or groups or autograd"
    " or found_inf_changes or fixed_point or (test_layouts and adamw) or test_momentum"
    " or large_index or (test_dtypes and all and sgd)"
    " or (test_shapes and adamw and all and (three or odd))"
    " or (every_beta and float32 and (0.3 or 0.999)) or pull_of_any or infinite_pull"
    " or no_float_holds or (refused_by_name and later)))"
)


@needs_triton
def test_suite_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", SELECTED, "-p", "no:cacheprovider"]
    command += ["-m", "not gpu and not slow"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "kernels")],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) >= 40
    assert "skipped" not in done.stdout.splitlines()[-1]


# (dtypes of param, grad, moments, anchor, curvature by csrc's Dtype; whether there are remainders).
F32, F64, BF16, CODES = map(
    DTYPES.index, (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
)
VARIANTS = {
    "plain": ((F32, F32, F32, F32, 0, 0), False),
    "anchor": ((F32, F32, F32, F32, F32, 0), False),
    "curvature": ((F32, F32, F32, F32, F32, F32), False),
    "bf16_state": ((F32, F32, BF16, BF16, BF16, BF16), False),
    "codes": ((F32, F32, CODES, CODES, BF16, CODES), False),
    "remainders": ((BF16, BF16, BF16, BF16, BF16, CODES), True),
    "float64": ((F64, F64, F64, F64, F64, F64), False),
}
MAIN = ("plain", "anchor", "curvature", "bf16_state")


@functools.cache
def compiled(rule: str, types: tuple[int, ...], remainder: bool, clip: bool):
    """The update kernel for sm_90 and its kind."""
    from fastkernels.ops.update.triton import kernels, launch

    if rule == "sgd":
        types = (*types[:3], 0, *types[4:])
    kind = launch.kind_of(bytes(types), remainder, True)
    rule_constants = launch.RULES[f"anchored_{rule}_"] | {"COLUMNS": 7}
    constants = {**rule_constants, **kind._asdict(), "CLIP": clip, "STATS": True}
    return offline(kernels.update_kernel, constants, kind.options), kind


def resources(kernel) -> sass.Usage:
    """Registers and bytes of stack and local memory of a thread."""
    if reason := sass.missing():
        pytest.skip(reason)
    (used,) = sass.usage(kernel.asm["cubin"]).values()
    return used


@needs_triton
@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_compiles_for_hopper_without_spills(rule, variant):
    kernel, kind = compiled(rule, *VARIANTS[variant], clip=False)
    used = resources(kernel)
    assert used.stack == used.local == 0, "registers are spilled"
    assert used.registers <= (64 if variant in MAIN else 96 if variant != "float64" else 144)
    ptx = kernel.asm["ptx"]
    # Streams of the whole tiles, by what they take: .v4.b32 is 128 bits.
    streams = [kind.P, kind.G, kind.M, kind.V, kind.A, kind.F]
    widest = [s for s in streams if s is not None and str(s) == "fp32"]
    wide = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
    assert wide >= len(widest), f"{wide} 128-bit loads for {len(widest)} float32 streams"
    stored = [s for s in (kind.P, kind.M, kind.V) if str(s) == "fp32"]
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= len(stored)


@needs_triton
@needs_compiler
def test_clipping_needs_no_more():
    used = resources(compiled("adamw", *VARIANTS["curvature"], clip=True)[0])
    assert used.registers <= 64
    assert used.stack == used.local == 0


@needs_triton
@needs_compiler
@pytest.mark.parametrize("name", ["gradient_norm", "clip", "finish"])
def test_what_goes_before_and_after_compiles_too(name):
    import triton.language as tl

    from fastkernels.ops.update.triton import kernels, launch

    constants = {
        "gradient_norm": {"G": tl.float32, "ALIGN": 16, "BLOCK": launch.BLOCK},
        "clip": {"BLOCK": launch.REDUCE},
        "finish": {"CLIP": True, "BLOCK": launch.REDUCE},
    }[name]
    kernel = getattr(kernels, f"{name}_kernel")
    options = {"num_warps": launch.WARPS}
    compiled_kernel = offline(kernel, constants, options)
    used = resources(compiled_kernel)
    assert used.stack == used.local == 0
    assert used.registers <= 64
    if name == "gradient_norm":
        assert re.search(r"ld\.global\S*\.v4\.b32", compiled_kernel.asm["ptx"])


@pytest.mark.slow
@needs_triton
@needs_compiler
@pytest.mark.parametrize("moment", [F32, BF16, CODES])
@pytest.mark.parametrize(("param", "remainder"), [(F32, False), (BF16, False), (BF16, True)])
def test_no_storage_spills(moment, param, remainder):
    for anchor, curvature in itertools.product((0, F32, BF16), (0, F32, BF16, CODES)):
        types = (param, param, moment, moment, anchor, curvature)
        used = resources(compiled("adamw", types, remainder, clip=True)[0])
        assert used.stack == used.local == 0, types


# Classes, dtype, and the widest access that their number allows, in 32-bit words.
ROWS = [
    (1000, "fp32", 4), (1000, "bf16", 4), (100, "fp32", 4), (7, "fp32", 1),
    (16384, "fp32", 4), (32000, "fp32", 4), (128256, "bf16", 4),
]  # fmt: skip


@needs_triton
@needs_compiler
@pytest.mark.parametrize("write", [True, False], ids=["hvp", "quad"])
@pytest.mark.parametrize(("classes", "dtype", "words"), ROWS)
def test_cross_entropy_compiles_without_spills(classes, dtype, words, write):
    from fastkernels.ops.cross_entropy_hvp import triton as op

    kernel, launch = op.launch(classes, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    constants = {**launch, "C": classes, "WRITE": write}
    options = {"num_warps": constants.pop("num_warps")}
    pointers = {n: f"*{dtype}" for n in ("u", "p", "scale")} | {"quad": "*fp64"}
    if write:
        pointers["quad"] = pointers["u"]
    found = offline(kernel, constants, options, pointers)
    used = resources(found)
    assert used.stack == used.local == 0, "registers are spilled"
    wide = len(re.findall(rf"ld\.global\S*\.v{words}\.b32", found.asm["ptx"]))
    assert words == 1 or wide >= 2, "rows of p and u by 128 bits"
