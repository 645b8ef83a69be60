"""What a GPU kernel was compiled to: its instructions, read from a cubin by NVIDIA's disassembler.

No GPU is needed. `nvdisasm` and `cuobjdump` come with the CUDA toolkit and with Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A multiprocessor of an H100 or H200: registers, threads, blocks, and bytes of shared memory.
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 228 * 1024
Accesses = Counter[tuple[str, int]]  # (LDG or STG, bits) -> how many


@functools.cache
def tool(name: str) -> str | None:
    """The path of a tool of CUDA: on PATH, or the one that Triton brings."""
    spec = importlib.util.find_spec("triton")
    roots = spec.submodule_search_locations if spec else None
    folders = [str(Path(root, "backends/nvidia/bin")) for root in roots or ()]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def missing() -> str:
    """Why cubins cannot be read here, or ""."""
    absent = [name for name in ("nvdisasm", "cuobjdump") if tool(name) is None]
    return f"{' and '.join(absent)} not found: install triton or the CUDA toolkit" if absent else ""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of SASS. `target` is the address that a branch goes to."""

    address: int
    opcode: str
    predicated: bool
    target: int | None

    @property
    def access(self) -> tuple[str, int] | None:
        """(LDG or STG, bits), of an access to global memory."""
        name, *modifiers = self.opcode.split(".")
        if name not in ("LDG", "STG"):
            return None
        narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
        return name, next((narrow[m] for m in modifiers if m in narrow), 32)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a thread takes: registers, and bytes of stack, of shared and of local memory."""

    registers: int
    stack: int
    shared: int
    local: int

    def warps(self, threads: int) -> int:
        """The warps of a multiprocessor that runs blocks of so many threads."""
        of_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(
            REGISTERS // of_warp // (threads // 32),
            THREADS // threads,
            SHARED // (self.shared + 1024),
            BLOCKS,
        )
        return blocks * threads // 32


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+|\$?[\w$]+):")


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of every kernel of a cubin, by its mangled name."""
    text = _run("nvdisasm", cubin, "-c")
    kernels: dict[str, list[Instruction]] = {}
    for section in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        lines = section.splitlines()
        labels: dict[str, int] = {}
        pending: list[str] = []
        matches: list[tuple[re.Match[str], str | None]] = []
        for line in lines[1:]:
            if label := _LABEL.match(line):
                pending.append(label[1])
            elif match := _LINE.search(line):
                labels |= dict.fromkeys(pending, int(match[1], 16))
                pending = []
                goal = re.search(r"`\((\S+)\)", match[4]) if match[3].startswith("BRA") else None
                matches.append((match, goal[1] if goal else None))
        kernels[lines[0].rstrip(":")] = [
            Instruction(
                address=int(m[1], 16),
                opcode=m[3],
                # `BRA P1, ...` may fall through as well as `@P1 BRA`.
                predicated=bool(m[2])
                or (m[3].startswith("BRA") and bool(re.match(r"\s*!?U?P", m[4]))),
                target=labels.get(goal) if goal else None,
            )
            for m, goal in matches
        ]
    return kernels


def usage(cubin: bytes) -> dict[str, Usage]:
    """What every kernel of a cubin takes, by its mangled name."""
    text = _run("cuobjdump", cubin, "-res-usage")
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: Usage(registers=int(r), stack=int(k), shared=int(s), local=int(n))
        for name, r, k, s, n in re.findall(pattern, text)
    }


def _run(name: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool(name)), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way through a loop: its instructions, how often it waits for its whole block, and how
    many times over it makes the widest of the loads of the minimum (an unrolled loop)."""

    instructions: int
    barriers: int
    times: int


def shortest_pass(code: list[Instruction], minimum: Accesses) -> Pass | None:
    """The shortest way through any loop that makes at least the accesses `minimum`, or None.

    Branches may be taken or not, so of a loop that has none this is its body, and of one that looks
    types up while it runs it is the least that these types can cost. Calls count as one
    instruction.
    """
    loops = {(i.target, i.address) for i in code if i.target is not None and i.target <= i.address}
    passes = [p for begin, end in loops if (p := _shortest(code, begin, end, minimum))]
    return min(passes, key=lambda p: p.instructions / p.times, default=None)


def _shortest(code: list[Instruction], begin: int, end: int, minimum: Accesses) -> Pass | None:
    body = [i for i in code if begin <= i.address <= end]
    have: Accesses = Counter(i.access for i in body if i.access)
    if any(have[key] < count for key, count in minimum.items()):
        return None
    keys = list(minimum)
    widest = max((key for key in keys if key[0] == "LDG"), key=lambda key: key[1])
    # address -> counts of the accesses so far (no more than minimum) -> (instructions, barriers,
    # loads of the widest)
    best: dict[int, dict[tuple[int, ...], tuple[int, int, int]]]
    best = {begin: {(0,) * len(keys): (0, 0, 0)}}
    for here, after in zip(body, [*body[1:], None], strict=True):
        for counts, (length, barriers, loads) in best.pop(here.address, {}).items():
            if here.access in minimum:
                k = keys.index(here.access)
                counts = (*counts[:k], min(counts[k] + 1, minimum[keys[k]]), *counts[k + 1 :])
            waits = here.opcode.startswith("BAR")
            cost = length + 1, barriers + waits, loads + (here.access == widest)
            if after is None:
                if counts == tuple(minimum.values()):
                    return Pass(
                        instructions=cost[0], barriers=cost[1], times=cost[2] // minimum[widest]
                    )
                continue
            for goal in _goals(here, after.address):
                if here.address < goal <= end:
                    costs = best.setdefault(goal, {})
                    costs[counts] = min(cost, costs.get(counts, cost))
    return None


def _goals(here: Instruction, after: int) -> Iterator[int]:
    if here.target is not None:
        yield here.target
    leaves = here.opcode in ("BRA", "EXIT") or here.opcode.startswith("RET")
    if here.predicated or not leaves:
        yield after
