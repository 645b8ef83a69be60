"""The CPU update's inner loops of this tree beside another one's, where the machine is busy.

    python -m benchmarks.kernels.builds.slices --before TREE [--save NAME]

Both are compiled into one program, and take slices of the same tensors in turn, from memory, on one
thread; so does a walk over the same streams that computes nothing (the floor).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, Record, commit, save, table
from benchmarks.kernels.builds.before_after import processor
from benchmarks.kernels.machine_code.cpu import ROOT, build_flags

SOURCE = Path(__file__).parents[1] / "native" / "slices.cpp"
FIGURES = ("before", "after", "floor", "after / before", "before / floor", "after / floor")


def measure(before: Path, isa: str, flags: list[str], folder: Path) -> list[Record]:
    common = ["g++", *flags, "-fopenmp", f"-DFAST_ISA={isa}"]
    objects = []
    for name, tree, more in (("before", before, ["-Dfast=before"]), ("after", ROOT, [])):
        objects.append(str(folder / f"{name}-{isa}.o"))
        source = str(tree / "csrc/cpu/anchored_isa.cpp")
        include = f"-I{tree / 'csrc/include'}"
        subprocess.run([*common, *more, include, "-c", source, "-o", objects[-1]], check=True)
    program = str(folder / f"slices-{isa}")
    include = [f"-I{ROOT / 'csrc' / name}" for name in ("include", "cpu")]
    subprocess.run([*common, *include, str(SOURCE), *objects, "-o", program], check=True)
    lines = subprocess.run(
        [program], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [
        {"instruction set": isa, "method": name}
        | dict(zip(FIGURES, map(float, figures), strict=True))
        for name, *figures in (line.split("|") for line in lines)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other tree")
    parser.add_argument("--save", metavar="NAME", help="of the files in benchmarks/results/")
    args = parser.parse_args()
    common, sets = build_flags()
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for isa, own in sets.items():
            rows += measure(args.before.resolve(), isa, [*common, *own], Path(folder))
    where = f"ns per element (lower quartiles), and medians of ratios; {processor()}; {commit()}"
    lines = [*table(rows), "", where]
    if not args.save:
        print("\n".join(lines))
        return
    save(args.save, lines)
    data = {"machine": where, "rows": rows}
    (RESULTS / f"{args.save}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
