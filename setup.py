"""Builds the native kernels, `fastkernels._C`, from csrc/; everything else is in pyproject.toml.

torch is not imported: the kernels know nothing of it, so ordinary build isolation works and a built
module survives a torch upgrade. Without a C++ compiler the install goes through and the plain-torch
kernels are used; FAST_REQUIRE_NATIVE=1 makes that an error. CXX picks the compiler, MAX_JOBS bounds
the parallel jobs.

The CUDA kernels, `fastkernels._C_cuda`, are built as well where nvcc (on PATH or in CUDA_HOME) and
an NVIDIA driver are found; FAST_CUDA=1 does without the driver and makes a failure an error,
FAST_CUDA=0 leaves them out.
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


# One cubin for each generation, and code the driver compiles for all others. -fmad=false: products
# are fused where the source says so, as on the CPU.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DNDEBUG",
              "-Xcompiler=-fPIC,-fvisibility=hidden",
              "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
              "-gencode=arch=compute_80,code=compute_80"]  # fmt: skip


def find_nvcc() -> str | None:
    """nvcc, where the CUDA kernels are to be built.

    Raises:
        FileNotFoundError: FAST_CUDA=1 and no nvcc.
    """
    asked = os.environ.get("FAST_CUDA", "")
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if asked == "0" or not (asked == "1" or driver):
        return None
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH"))
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    found = found or shutil.which("nvcc")
    if found is None and asked == "1":
        raise FileNotFoundError("FAST_CUDA=1 and no nvcc: put it on PATH or set CUDA_HOME")
    return found


def build_cuda(nvcc: str, folder: Path, target: Path) -> None:
    """`_C_cuda`: kernels by nvcc, bindings by its host compiler, the CUDA runtime linked in."""
    import pybind11

    include = [f"-I{CSRC / 'include'}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    objects = []
    for source in [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "bindings.cpp"]:
        objects.append(str(folder / f"cuda_{source.stem}.o"))
        command = [nvcc, *NVCC_FLAGS, *include, *python, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    subprocess.run([nvcc, "-shared", *objects, "-o", str(target)], check=True)


class BuildNative(build_ext):
    """Compiles in parallel and incrementally with ninja, in build/native-<python>."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path("build", f"native-{sys.implementation.cache_tag}").resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("_cuda"):
            try:
                build_cuda(str(find_nvcc()), folder, target)
            except (OSError, ImportError, subprocess.CalledProcessError) as error:
                if os.environ.get("FAST_CUDA") == "1":
                    raise
                print(f"warning: fastkernels is installed without CUDA C++ kernels: {error}")
            return
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
extensions = [Extension("fastkernels._C", sources=sorted(set(sources)), optional=True)]
if find_nvcc():
    cuda = [str(CSRC / "cuda" / name) for name in ("anchored.cu", "bindings.cpp")]
    extensions.append(Extension("fastkernels._C_cuda", sources=cuda, optional=True))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
)
