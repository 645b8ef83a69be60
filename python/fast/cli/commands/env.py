"""`fast env`."""

from __future__ import annotations

import json
from dataclasses import asdict

import fastkernels
from fast.cli.report.machine import describe, version_of
from fast.cli.report.table import text_table
from fast.cli.spec import EnvSpec
from fast.errors import distribution

# module -> what it is for
OPTIONAL = {
    "PIL": "image files",
    "soundfile": "sounds that are no plain WAV",
    "pandas": "data frames",
    "pyarrow": ".parquet",
    "matplotlib": "plots",
    "sklearn": "fast demo",
    "timm": "models timm:NAME",
    "torchvision": "models torchvision:NAME",
    "transformers": "models transformers:NAME, texts",
    "datasets": "Hugging Face data sets",
    "peft": "method adapter",
    "onnx": "fast export --format onnx",
    "onnxscript": "fast export --format onnx",
    "onnxruntime": "comparing what --format onnx wrote",
    "tensorboard": "TensorBoard logs",
}


def run(spec: EnvSpec) -> int:
    machine, kernels = describe(), [asdict(row) for row in fastkernels.explain()]
    libraries = {name: version_of(distribution(name), name) for name in OPTIONAL}
    if spec.json:
        print(json.dumps({**machine, "kernels": kernels, "libraries": libraries}, indent=2))
        return 0
    print("\n".join(f"{name:8} {value}" for name, value in machine.items()))
    rows = [
        [k["op"], k["backend"], k["device"], "yes" if k["available"] else "no", k["reason"]]
        for k in kernels
    ]
    print("\n" + text_table(["op", "backend", "device", "available", "reason"], rows, left=5))
    rows = [[name, libraries[name] or "missing", use] for name, use in OPTIONAL.items()]
    print("\n" + text_table(["library", "version", "for"], rows, left=3))
    return 0
