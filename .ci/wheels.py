"""Build a wheel for each Python from 3.11 to 3.13 that is found, repair it, and try it.

    pip install -c constraints.txt '.[wheels]' && python .ci/wheels.py --output dist

The wheels are built from the source distribution, which goes into the same folder. auditwheel gives
each the oldest manylinux tag that its symbols allow; an older tag needs a compiler with an older
libc, such as that of a manylinux image. libgomp is not copied into the wheel: torch brings it, and
the kernels share torch's threads only if they share its library. The native module links nothing
else of torch; those names are excluded all the same, so that no wheel ever carries a copy of them.

A repaired wheel is installed in a fresh environment. With the Python that runs this script it gets
its dependencies, and one optimizer step goes through the native kernels. With others it gets them
only with `--dependencies`, because torch's default wheels for Linux are gigabytes; else the native
module is loaded by itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
EXCLUDED = ("libgomp.so.1", "libtorch*.so", "libc10*.so", "libcudart.so.*")
FACTS = """
import sys, sysconfig
from pathlib import Path
header = Path(sysconfig.get_paths()["include"], "Python.h")
print("%d.%d" % sys.version_info[:2], header.is_file())
"""
STEP = """
import fast, torch
from fastkernels.backends import native
assert native.available()[0], native.available()[1]
layer = torch.nn.Linear(3, 2)
optimizer = fast.AdamW(layer.parameters(), lr=0.1, anchor_decay=1.0)
before = layer.weight.detach().clone()
layer(torch.ones(4, 3)).sum().backward()
optimizer.step()
assert (layer.weight != before).all()
print("one step with the native kernels,", native.available()[1])
"""
LOAD = """
import importlib.machinery, importlib.util, pathlib, sysconfig
(path,) = pathlib.Path(sysconfig.get_paths()["purelib"], "fastkernels").glob("_C.*.so")
loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
print("the native module loads,", module.cpu_instruction_set(), "(tried without torch)")
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("dist"), help="default: dist")
    parser.add_argument("--versions", default=",".join(VERSIONS), help="default: %(default)s")
    parser.add_argument(
        "--dependencies", action="store_true", help="install torch with each Python, and try a step"
    )
    given = parser.parse_args(arguments)
    output = given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        source = build_source(Path(folder), output)
        for version in given.versions.split(","):
            python, reason = find_python(version)
            if python is None:
                lines.append(f"{version}: skipped, {reason}")
                continue
            wheel = build_wheel(python, source, Path(folder, version), output)
            full = given.dependencies or version == THIS
            tried = try_wheel(python, wheel, Path(folder, f"try-{version}"), full)
            lines.append(f"{version}: {wheel.name}: {tried}")
    print("\n".join(lines))
    return 0


def find_python(version: str) -> tuple[str | None, str]:
    """An interpreter of this version that has its headers; or None, and why there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable, shutil.which(f"python{version}") or ""]
    candidates += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")))
    reason = f"no python{version} on PATH or in {pyenv}"
    for candidate in filter(None, candidates):
        command = [candidate, "-I", "-c", FACTS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or done.stdout.split()[0] != version:
            continue  # another version, or a shim with no interpreter behind it
        if done.stdout.split()[1] == "True":
            return candidate, ""
        reason = f"{candidate} has no Python.h"
    return None, reason


def build_source(folder: Path, output: Path) -> Path:
    """The source distribution, of a copy that has nothing in it but what git keeps."""
    copy = folder / "checkout"
    names = _run(["git", "ls-files", "-z"], cwd=ROOT, capture=True).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    _run([sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(copy)])
    (source,) = folder.glob("*.tar.gz")
    return Path(shutil.copy(source, output))


def build_wheel(python: str, source: Path, folder: Path, output: Path) -> Path:
    """The wheel of one Python, repaired."""
    folder.mkdir()
    environment = {**os.environ, "FAST_REQUIRE_NATIVE": "1", "FAST_CUDA": "0"}
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    _run(command, environment=environment)
    (wheel,) = folder.glob("*.whl")
    repair = [sys.executable, "-m", "auditwheel", "repair", "-w", str(folder / "repaired")]
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    _run([*repair, *excluded, str(wheel)])
    (repaired,) = (folder / "repaired").glob("*.whl")
    return Path(shutil.copy(repaired, output))


def try_wheel(python: str, wheel: Path, folder: Path, full: bool) -> str:
    """What a fresh environment says of the wheel."""
    _run([python, "-m", "venv", str(folder)])
    fresh = str(folder / "bin" / "python")
    how = ["-c", str(ROOT / "constraints.txt")] if full else ["--no-deps"]
    _run([fresh, "-m", "pip", "install", "--quiet", *how, str(wheel)])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = [fresh, "-c", STEP if full else LOAD]
    return _run(code, cwd=folder, environment=environment, capture=True).strip()


def _run(
    command: list[str],
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    capture: bool = False,
) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=True,
    )
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
