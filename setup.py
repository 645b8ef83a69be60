"""Builds the native kernels from csrc/ with ninja; everything else is in pyproject.toml.

`fastkernels._C` holds the CPU kernels. torch is not imported: the kernels know nothing of it, so
ordinary build isolation works and a built module survives a torch upgrade. Without a C++ compiler
the install goes through and the plain-torch kernels are used; FAST_REQUIRE_NATIVE=1 makes that an
error. CXX picks the compiler, MAX_JOBS bounds the parallel jobs.

`fastkernels._C_cuda`, the CUDA kernels, is built as well where nvcc (on PATH or in CUDA_HOME) and
an NVIDIA driver are found; FAST_CUDA=1 does without the driver and makes a failure an error,
FAST_CUDA=0 leaves it out.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# No -ffast-math. Without -fno-math-errno and -fno-trapping-math, sqrt is not vectorised (1.66x
# slower). Contraction is written out in csrc/include/fast/numeric.h, so that vector bodies and
# scalar tails round alike.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
         "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")),
               "-mprefer-vector-width=512"],
}  # fmt: skip
# One cubin for each generation, and code the driver compiles for all others. -fmad=false: products
# are fused where the source says so, as on the CPU.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DNDEBUG", "--threads=2",
              "-Xcompiler=-fPIC,-fvisibility=hidden",
              "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
              "-gencode=arch=compute_80,code=compute_80"]  # fmt: skip


class Step(NamedTuple):
    """One source file compiled once, to the object `name`, with `flags` of its own."""

    source: Path
    name: str
    flags: list[str]


def cpu_steps() -> list[Step]:
    """`*_isa.cpp` is compiled once per instruction set."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    steps = []
    for source in [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
        if not source.stem.endswith("_isa"):
            steps.append(Step(source, source.stem, ["-DFAST_X86"] if x86 else []))
            continue
        for name, flags in INSTRUCTION_SETS.items():
            if x86 or not flags:
                flags = [*flags, f"-DFAST_ISA={name}"]
                steps.append(Step(source, f"{source.stem}_{name}", flags))
    return steps


def cuda_steps() -> list[Step]:
    """Kernels by nvcc, bindings by its host compiler."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "bindings.cpp"]
    return [Step(source, f"cuda_{source.stem}", []) for source in sources]


def find_compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        if path := shutil.which(candidate):
            return path
    raise FileNotFoundError(f"no C++ compiler: {named or 'g++, clang++, c++'} not found")


def find_nvcc() -> str | None:
    """nvcc, where the CUDA kernels are to be built.

    Raises:
        FileNotFoundError: FAST_CUDA=1 and no nvcc.
    """
    wanted = os.environ.get("FAST_CUDA", "")
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if wanted == "0" or not (wanted == "1" or driver):
        return None
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH"))
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise FileNotFoundError("FAST_CUDA=1 and no nvcc: put it on PATH or set CUDA_HOME")
    return nvcc


def openmp_flags(compiler: str, folder: Path) -> list[str]:
    """`-fopenmp` where the compiler has it; one thread otherwise."""
    probe = folder / "openmp.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [compiler, "-fopenmp", str(probe), "-o", str(folder / "openmp")]
    compiled = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ["-fopenmp"] if compiled else []


def ninja_file(cuda: bool, folder: Path, target: Path) -> str:
    """How to build one module; nvcc links the CUDA runtime in."""
    import pybind11

    if cuda:
        compiler, flags, link, steps = str(find_nvcc()), NVCC_FLAGS, ["-shared"], cuda_steps()
    else:
        compiler, steps = find_compiler(), cpu_steps()
        openmp = openmp_flags(compiler, folder)
        darwin = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        flags, link = [*FLAGS, *openmp], ["-shared", *openmp, *darwin]

    def quote(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    include = [f"-I{(CSRC / 'include').resolve()}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
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
    for step in steps:
        objects.append(quote(folder / f"{step.name}.o"))
        needs_python = python if step.source.name == "bindings.cpp" else []
        lines.append(f"build {objects[-1]}: compile {quote(step.source.resolve())}")
        lines.append(f"  flags = {' '.join([*flags, *include, *needs_python, *step.flags])}")
    lines.append(f"build {quote(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Compiles in parallel and incrementally with ninja, in build/native-<python>."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path("build", f"native-{sys.implementation.cache_tag}").resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        cuda = ext.name.endswith("_cuda")
        try:
            file = folder / ("cuda.ninja" if cuda else "build.ninja")
            file.write_text(ninja_file(cuda, folder, target))
            jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
            ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-f", file.name, *jobs]
            subprocess.run(ninja, check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            required = "FAST_CUDA" if cuda else "FAST_REQUIRE_NATIVE"
            if os.environ.get(required) == "1":
                raise
            kernels, missing = (
                ("CUDA C++", "nvcc") if cuda else ("native", "a C++17 compiler")
            )  # fmt: skip
            print(f"warning: fastkernels is installed without {kernels} kernels: {error}")
            print(f"warning: install {missing} and install again; {required}=1 makes this an error")

    def get_output_mapping(self) -> dict[str, str]:
        """What a strict editable install links: a module that could not be built is not there."""
        mapping = super().get_output_mapping()
        return {built: source for built, source in mapping.items() if Path(source).exists()}


modules = ["_C", "_C_cuda"] if find_nvcc() else ["_C"]
setup(
    ext_modules=[Extension(f"fastkernels.{m}", sources=[], optional=True) for m in modules],
    cmdclass={"build_ext": BuildNative},
)
