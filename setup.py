"""Builds the native kernels, `fastkernels._C`, from csrc/; everything else is in pyproject.toml.

torch is not imported: the kernels know nothing of it, so ordinary build isolation works and a built
module survives a torch upgrade. Without a C++ compiler the install goes through and the plain-torch
kernels are used; FAST_REQUIRE_NATIVE=1 makes that an error. CXX picks the compiler, MAX_JOBS bounds
the parallel jobs.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# No -ffast-math. Without -fno-math-errno and -fno-trapping-math, sqrt is not vectorised (1.66x
# slower). Contraction is written out in csrc/include/fast/numeric.h, so that vector bodies and
# scalar tails round alike.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
         "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")),
               "-mprefer-vector-width=512"],
}  # fmt: skip


def compile_steps() -> list[tuple[Path, str, list[str]]]:
    """(source, object name, extra flags); `*_isa.cpp` is compiled once per instruction set."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    steps = []
    for source in [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
        if not source.stem.endswith("_isa"):
            steps.append((source, source.stem, ["-DFAST_X86"] if x86 else []))
            continue
        for name, flags in INSTRUCTION_SETS.items():
            if x86 or not flags:
                steps.append((source, f"{source.stem}_{name}", [*flags, f"-DFAST_ISA={name}"]))
    return steps


def find_compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        if path := shutil.which(candidate):
            return path
    raise FileNotFoundError(f"no C++ compiler: {named or 'g++, clang++, c++'} not found")


def openmp_flags(compiler: str, folder: Path) -> list[str]:
    """`-fopenmp` where the compiler has it; one thread otherwise."""
    probe = folder / "openmp.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [compiler, "-fopenmp", str(probe), "-o", str(folder / "openmp")]
    found = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ["-fopenmp"] if found else []


def ninja_file(compiler: str, folder: Path, target: Path) -> str:
    import pybind11

    def quote(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    openmp = openmp_flags(compiler, folder)
    include = [f"-I{(CSRC / 'include').resolve()}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    link = ["-shared", *openmp]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    lines = [
        f"cxx = {compiler}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {' '.join(link)} -o $out",
    ]
    objects = []
    for source, name, extra in compile_steps():
        objects.append(quote(folder / f"{name}.o"))
        needs_python = python if source.name == "bindings.cpp" else []
        flags = [*FLAGS, *openmp, *include, *needs_python, *extra]
        lines.append(f"build {objects[-1]}: compile {quote(source.resolve())}")
        lines.append(f"  flags = {' '.join(flags)}")
    lines.append(f"build {quote(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Compiles in parallel and incrementally with ninja, in build/native-<python>."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path("build", f"native-{sys.implementation.cache_tag}").resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "build.ninja").write_text(ninja_file(find_compiler(), folder, target))
            jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *jobs], check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("FAST_REQUIRE_NATIVE") == "1":
                raise
            print(f"warning: fastkernels is installed without native kernels: {error}\n"
                  "warning: install a C++17 compiler and install again; "
                  "FAST_REQUIRE_NATIVE=1 makes this an error")  # fmt: skip


sources = [str(source) for source, _, _ in compile_steps()]
setup(
    ext_modules=[Extension("fastkernels._C", sources=sorted(set(sources)), optional=True)],
    cmdclass={"build_ext": BuildNative},
)
