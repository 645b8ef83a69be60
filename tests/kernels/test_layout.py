"""What Python and csrc both write down: columns, numbers of dtypes, constants; csrc's headers are
read as text."""

from __future__ import annotations

import re

import pytest
import torch

from fastkernels import codes
from fastkernels.ops.update.adamw import ADAMW
from fastkernels.ops.update.call import MAX_PULL, STATS
from fastkernels.ops.update.device_plan import CHUNK
from fastkernels.ops.update.plan import DTYPES, ROW
from fastkernels.ops.update.sgd import SGD
from helpers import ROOT
from kernels import cases


def header(name: str) -> str:
    """The text of a header without its comments."""
    return re.sub(r"//.*", "", (ROOT / "csrc" / "include" / "fast" / name).read_text())


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@pytest.mark.parametrize(("rule", "space"), [(ADAMW, "adamw_column"), (SGD, "sgd_column")])
def test_columns_of_the_hyper_table(rule, space):
    (enum,) = re.findall(rf"namespace {space} {{\s*enum {{(.*?)}}", header("update.h"), re.DOTALL)
    assert names(enum) == [*rule.columns, "count"]


def test_figures():
    (enum,) = re.findall(r"enum Stat {(.*?)}", header("anchored.h"))
    assert names(enum) == [*STATS, "kStats"]


def test_fields_of_a_row():
    (body,) = re.findall(r"struct Row {(.*?)};", header("anchored.h"), re.DOTALL)
    fields = []
    for declaration in body.split(";"):
        if match := re.search(r"(\w+)(?:\[(\d)\])?\s*$", declaration.rstrip()):
            name, count = match.groups()
            fields += [f"{name}[{k}]" for k in range(int(count))] if count else [name]
    # The dtypes share the last words with the group.
    assert fields[: len(ROW) - 1] == list(ROW[:-1])
    (types,) = re.findall(r"Dtype (param_type.*?);", body)
    assert names(types) == ["param_type", "grad_type", "moment_type[2]", "anchor_type",
                            "curvature_type"]  # fmt: skip


def test_numbers_of_dtypes():
    (enum,) = re.findall(r"enum class Dtype : uint8_t {(.*?)}", header("numeric.h"))
    spelled = {
        None: "none", torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16",
        torch.float16: "f16", torch.uint8: "codes8",
    }  # fmt: skip
    assert names(enum) == [spelled[dtype] for dtype in DTYPES]


CONSTANTS = {
    "kMaxPull": MAX_PULL,
    "kCodeBlock": codes.CODE_BLOCK,
    "kOne": codes.ONE,
    "kUnsignedTop": codes.UNSIGNED_TOP,
    "kSignedTop": codes.SIGNED_TOP,
    "kSignedFlat": codes.SIGNED_FLAT,
    "kSignedFine": codes.SIGNED_FINE,
    "kSignedShift": codes.SIGNED_SHIFT,
    "kSignedKnee": codes.SIGNED_KNEE,
    "kLeastScale": codes.LEAST_SCALE,
}


def number(text: str) -> float:
    """A literal of C++, or a quotient of two."""
    top, _, bottom = text.partition("/")
    value = top.strip().rstrip("fu")
    digits = (
        float.fromhex(value) if "p" in value else float(int(value, 0) if "x" in value else value)
    )
    return digits / number(bottom) if bottom else digits


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name):
    text = header("numeric.h") + header("update.h")
    (value,) = re.findall(rf"\b{name} = (.*?)[,;]", text)
    assert number(value) == CONSTANTS[name]


def test_sizes_that_the_cases_are_about():
    (chunk,) = re.findall(r"kChunk = (\d+);", header("anchored.h"))
    (tile,) = re.findall(r"kTile = (\d+);", (ROOT / "csrc" / "cpu" / "storage.h").read_text())
    assert (int(chunk), int(tile)) == (cases.CHUNK, cases.TILE)


def test_a_chunk_is_whole_code_blocks_and_divides_the_range_of_a_draw():
    assert CHUNK % codes.CODE_BLOCK == 0
    assert 2**32 % CHUNK == 0
