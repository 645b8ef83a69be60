"""Peak resident memory of K products above what is resident after one gradient (Linux).

python benchmarks/hvp_memory.py CASE KIND METHOD K
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hvp_cases import METHODS, build, gradient, probes


def main(case: str, kind: str, method: str, count: str) -> None:
    model, x, y = build(case)
    vectors = probes(model, int(count))
    gradient(model, x, y)()
    # getrusage's peak is inherited from the parent process; this one can be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmHWM")
    METHODS[kind][method](model, x, y, vectors)()
    print(json.dumps({"peak_mib": (_kib("VmHWM") - before) / 1024}))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
