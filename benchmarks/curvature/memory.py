"""Peak resident memory of K products above what is resident after one gradient (Linux).

    python -m benchmarks.curvature.memory CASE KIND METHOD K

The figure counts everything that the call allocates, the result [K, P] with it, and the code that
it loads. It does not count torch, the network, its batch and the vectors [K, P], which are there
before. `result_mib` is the part of the result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.curvature.methods import METHODS, gradient, probes
from benchmarks.curvature.networks import build


def main(case: str, kind: str, method: str, count: str) -> None:
    model, x, y = build(case)
    vectors = probes(model, int(count))
    products = METHODS[kind][method](model, x, y, vectors)
    gradient(model, x, y)()
    # getrusage's peak is inherited from the parent process; this one can be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmHWM")
    result = products()
    peak = (_kib("VmHWM") - before) / 1024
    size = sum(v.numel() * v.element_size() for v in result.values()) / 2**20
    print(json.dumps({"peak_mib": peak, "result_mib": size}))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
