"""Instructions per element of the vector loops of the CPU update, counted in their machine code.

    python -m benchmarks.kernels.machine_code.cpu [CSRC ...]

It needs g++ and objdump, on x86-64. A loop takes as many elements at once as its square roots do.
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import Record, table

ROOT = Path(__file__).parents[3]
LANES = {"zmm": 16, "ymm": 8, "xmm": 4}
# Moment, anchor and curvature as the loop is compiled for them.
VARIANTS = {
    "AdamW": "float, None, None",
    "AdamW, bf16 state": "Bf16, None, None",
    "+ anchor": "float, float, None",
    "+ anchor + curvature + norms": "float, float, float",
    "+ anchor + curvature + norms, bf16 state": "Bf16, Bf16, Bf16",
}
Instruction = tuple[int, str, str]  # address, operation, operands


def build_flags() -> tuple[list[str], dict[str, list[str]]]:
    """The flags of setup.py: of all files, and of each instruction set."""
    with mock.patch("setuptools.setup"):
        setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    return setup["FLAGS"], setup["INSTRUCTION_SETS"]


def functions(csrc: Path, flags: list[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """The name and the machine code of the update loop of each variant."""
    lines = [f'#include "{csrc.resolve()}/cpu/anchored_isa.cpp"', "namespace fast {"]
    for i, types in enumerate(VARIANTS.values()):
        # Used here, so that it is there in a body of its own.
        lines.append(f"__attribute__((used)) auto* const loop{i} = "
                     f"&update<AdamW<float>, float, {types}>;")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "loops.cpp"), Path(folder, "loops.o")
        source.write_text("\n".join([*lines, "}"]))
        include = [f"-I{csrc / 'include'}", f"-I{csrc / 'cpu'}"]
        subprocess.run(["g++", *flags, *include, "-c", source, "-o", target], check=True)
        command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(target)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for body in text.split("\n\n"):
        head = re.search(r"^[0-9a-f]+ <(void fast.*::update<fast::AdamW<float>, float, .*)>:$",
                         body, re.MULTILINE)  # fmt: skip
        if head is None:
            continue
        rows = re.findall(r"^ +([0-9a-f]+):\s+(\S+) *(.*)$", body, re.MULTILINE)
        types = head[1].replace("fast::(anonymous namespace)::", "")
        yield types, [(int(address, 16), name, operands) for address, name, operands in rows]


def vector_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with packed square roots."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    loops = []
    for i, (_, name, operands) in enumerate(code):
        target = re.match(r"[0-9a-f]+(?= )", operands) if name.startswith("j") else None
        if target and (begin := at.get(int(target[0], 16), i)) < i:
            loops.append(code[begin : i + 1])
    packed = [loop for loop in loops if any("sqrtps" in name for _, name, _ in loop)]
    return min(packed, key=len)


def measure(csrc: Path) -> Iterator[Record]:
    common, sets = build_flags()
    for isa, own in sets.items():
        for head, code in functions(csrc, [*common, "-fopenmp", f"-DFAST_ISA={isa}", *own]):
            names = [name for name, types in VARIANTS.items() if f" float, {types}>(" in head]
            if not names:
                continue
            loop = vector_loop(code)
            roots = [operands for _, name, operands in loop if "sqrtps" in name]
            lanes = next(lanes for register, lanes in LANES.items() if register in roots[0])
            divisions = sum("divps" in name for _, name, _ in loop)
            yield {
                "instruction set": isa,
                "loop": names[0],
                "elements at once": len(roots) * lanes,
                "instructions per element": f"{len(loop) / len(roots) / lanes:.2f}",
                "divisions": f"{divisions / len(roots):.0f}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csrc", nargs="*", type=Path, default=[ROOT / "csrc"])
    for csrc in parser.parse_args().csrc:
        print("\n".join([f"{csrc}:", "", *table(list(measure(csrc))), ""]))


if __name__ == "__main__":
    main()
