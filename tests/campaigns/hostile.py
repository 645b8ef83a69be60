"""Files that no friend would send, by what reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import runpy
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fast
from fast.files import read_sealed, write_sealed
from fast.train.resume.checkpoint import FORMAT

MODEL = ("--model", "nets.py:Net(3)", "--weights", "net.safetensors", "--steps", "2")
ESCAPES = "a\x1b[2J\x1b]0;title\x07\x9b\nfast: error: forged"


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(target):
    def build(path):
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return build


def text(value):
    return lambda path: path.write_bytes(value if isinstance(value, bytes) else value.encode())


def directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def sparse(path):
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(8 << 30)


STRANGE = {
    "a FIFO": fifo,
    "a link to /dev/zero": link("/dev/zero"),
    "a link to itself": lambda path: link(path.name)(path),
    "a dangling link": link("nowhere"),
    "a folder": directory,
    "empty": text(b""),
    "8 GB of nothing": sparse,
    "random bytes": text(bytes(range(256)) * 40),
}


def truncated(path):
    path.write_bytes(path.read_bytes()[:-60])


def npy(descr="|u1", shape=(4, 8, 8), data=b"", version=1, raw=None):
    """An .npy file with a header of one's own."""
    header = raw or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}"
    header = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + data


def member(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array))
    return buffer.getvalue()


def npz(**members):
    """An .npz of a few samples, with members of one's own."""

    def build(path):
        rng = np.random.default_rng(0)
        good = {"x": rng.integers(0, 255, (40, 8, 8), np.uint8), "y": np.arange(40) % 4}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in (good | members).items():
                if value is not None:
                    data = value if isinstance(value, bytes) else member(value)
                    archive.writestr(f"{name}.npy", data)

    return build


def bomb(name):
    """A member of 2 GB of zeros, 2 MB as it is packed."""

    def build(path):
        npz(**{name: None})(path)
        with (
            zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(f"{name}.npy", "w", force_zip64=True) as file,
        ):
            file.write(npy("|u1", (1 << 31,)))
            for _ in range(1 << 7):
                file.write(bytes(1 << 24))

    return build


NPZ = STRANGE | {
    "truncated": truncated,
    "a text": text("x,y\n1,2\n"),
    "an array called .npz": lambda path: path.write_bytes(member(np.zeros(3))),
    "a bomb that is not used": bomb("unused"),
    "a bomb of labels": bomb("y"),
    "pickled inputs": npz(x=npy("|O", (1,), pickle.dumps([Runs()]))),
    "pickled classes": npz(classes=npy("|O", (1,), pickle.dumps([Runs()]))),
    "absurd shape": npz(x=npy(shape=(1 << 50, 8, 8))),
    "overflowing shape": npz(x=npy(shape=(1 << 40, 1 << 40))),
    "negative shape": npz(x=npy(shape=(-1, 8, 8))),
    "short data": npz(x=npy(shape=(40, 8, 8), data=b"abc")),
    "no header": npz(x=b"\x93NUMPY\x01\x00\xff\xff"),
    "a header that is code": npz(x=npy(raw="__import__('os').system('touch ran')")),
    "a nested header": npz(x=npy(raw="(" * 100)),
    "another version": npz(x=npy(version=9)),
    "structured inputs": npz(x=np.zeros(40, [("a", "f4"), ("b", "i4")])),
    "dates": npz(x=np.zeros(40, "M8[s]")),
    "complex labels": npz(y=np.zeros(40, complex)),
    "infinite labels": npz(y=np.full(40, np.inf)),
    "huge labels": npz(y=np.full(40, 2**62)),
    "labels of bytes": npz(y=np.array([b"a"] * 40)),
    "no inputs": npz(x=None),
    "no labels": npz(y=None),
    "labels of two axes": npz(y=np.zeros((40, 2), int)),
    "scalar inputs": npz(x=np.float32(3)),
    "names twice": npz(classes=np.array(["a", "a", "b", "c"])),
    "names of two axes": npz(classes=np.array([["a", "b"], ["c", "d"]])),
    "names with escapes": npz(classes=np.array([ESCAPES, "b", "c", "d"])),
    "a name that climbs": npz(**{"../../climbs": np.zeros(3)}),
}


def png(width, height, data=b""):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(data or bytes((width + 1) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def photos(name="bad.png", build=lambda path: None, folder="a"):
    """Good images in two folders, and one more file, in one of them."""

    def make(path):
        for label in {"a", "b", folder}:
            (path / label).mkdir(parents=True, exist_ok=True)
            for i in range(5):
                rows = b"".join(b"\0" + os.urandom(8) for _ in range(8))
                (path / label / f"{i}.png").write_bytes(png(8, 8, rows))
        build(path / folder / name)

    return make


IMAGES = {f"{what} as an image": photos(build=build) for what, build in STRANGE.items()} | {
    "900 megapixels": photos(build=text(png(30000, 30000, b"0"))),
    "4 gigapixels": photos(build=text(png(65000, 65000, b"0"))),
    "no pixels": photos(build=text(png(0, 8, b"0"))),
    "half an image": photos(build=text(png(8, 8)[:-30])),
    "a text as an image": photos(build=text("<html>")),
    "a TIFF with a circle": photos("a.tif", text(b"II*\0\x08\0\0\0\0\0\x08\0\0\0")),
    "an image with escapes in its name": photos("\x1b[2J\n.png", text("no")),
    "a folder with escapes in its name": photos("x.png", text(png(8, 8)), ESCAPES.replace("/", "")),
    "a folder that holds itself": photos("loop", lambda path: path.symlink_to(path.parent)),
}


def header(value, data=b"", length=None):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS = STRANGE | {
    "truncated": truncated,
    "an endless header": text(header({}, length=1 << 60)),
    "a header of 200 MB": text(header({}, length=200 << 20)),
    "a nested header": text(header(b"[" * 100_000)),
    "an absurd shape": text(header({"fc.weight": tensor((1 << 60,))}, bytes(8))),
    "an overflowing shape": text(header({"fc.weight": tensor((1 << 40, 1 << 40))}, bytes(8))),
    "offsets beyond": text(header({"fc.weight": tensor((2,), "F32", (0, 1 << 40))}, bytes(8))),
    "no such dtype": text(header({"fc.weight": tensor(dtype="Q7")}, bytes(8))),
    "escapes in a name": text(header({ESCAPES: tensor()}, bytes(8))),
}

JSON = STRANGE | {
    "nested": text("[" * 200_000),
    "a nested object": text('{"a":' * 100_000),
    "a list": text("[]"),
    "null": text("null"),
    "no UTF-8": text(b'{"a": "\xff\xfe"}'),
    "a long number": text('{"format": ' + "9" * 5000 + "}"),
    "values of no type": text('{"format": 2, "step": {}, "model": [], "run": {"a": 1}}'),
    "escapes": text(json.dumps({"model": ESCAPES, "format": ESCAPES, "run": ESCAPES})),
}


def pickled(path):
    path.write_bytes(pickle.dumps(Runs()))


def torch_pickled(path):
    torch.save({"a": Runs()}, path)


def card(change):
    """A good card, with facts of one's own."""

    def build(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata["card"])
        change(facts)
        save_file(tensors, path, metadata | {"card": json.dumps(facts)})

    return build


CARDS = SAFETENSORS | {
    "a shape of 1e12": card(lambda f: f.update(shapes={"fc.weight": [10**12]})),
    "a negative shape": card(lambda f: f.update(shapes={"fc.weight": [-1]})),
    "shapes of no type": card(lambda f: f.update(shapes=7)),
    "no fingerprints": card(lambda f: f.pop("fingerprints")),
    "no calibration": card(lambda f: f.pop("calibration")),
    "unknown facts": card(lambda f: f.update(_anchors={}, more=1)),
    "a mean of no type": card(lambda f: f.update(mean="x")),
    "a temperature of no type": card(lambda f: f.update(temperature="hot")),
    "samples of no type": card(lambda f: f.update(num_samples="many")),
    "a temperature that is not finite": card(lambda f: f.update(temperature=float("nan"))),
    "a scale that is not finite": card(lambda f: f["calibration"].update(scale=float("inf"))),
    "a short shape": card(lambda f: f.update(shapes={n: [1] for n in f["shapes"]})),
}


def forged(change):
    """A state.json whose checksum is right."""

    def build(path):
        state = read_sealed(path, FORMAT)
        change(state)
        path.unlink()
        write_sealed(path, state)

    return build


def position(state):
    state["process generators"]["numpy"]["state"]["pos"] = 10**9


STATES = JSON | {
    "forged: a step": forged(lambda s: s.update(step=10**9)),
    "forged: a position": forged(position),
    "forged: no optimizer": forged(lambda s: s.pop("optimizer")),
    "forged: no record": forged(lambda s: s.update(record=None)),
}


def at(name):
    """Build at this place of the case's folder."""
    return lambda build: lambda folder: build(folder / name)


def all_cases():
    """(name, place of the file, build(folder), argv) of every case."""
    resume = ("finetune", "--resume", "run", "--model", "nets.py:Net(3)")
    data = ("finetune", *MODEL, "--data")
    weights = ("finetune", "--model", "nets.py:Net(3)", "--data", "good.npz", "--weights")
    groups = {
        "data": (NPZ, "data.npz", (*data, "data.npz")),
        "images": (IMAGES, "photos", (*data, "photos", "--input-size", "8")),
        "weights": (SAFETENSORS, "w.safetensors", (*weights, "w.safetensors")),
        "card": (CARDS, "c.safetensors", (*data, "good.npz", "--card", "c.safetensors")),
        "job.json": (JSON, "run/job.json", resume),
        "fast.json": (JSON, "run/fast.json", resume),
        "run.json": (JSON, "run/run.json", resume),
        "history": (JSON, "run/history.jsonl", resume),
        "state.json": (STATES, "run/checkpoint-00000002/state.json", resume),
        "checkpoint": (SAFETENSORS, "run/checkpoint-00000002/model.safetensors", resume),
        "manifest": (
            JSON,
            "run/manifest.json",
            ("curvature", "--checkpoint", "run", "--model", "nets.py:Net(3)"),
        ),
        "model file": (
            STRANGE,
            "bad.py",
            ("finetune", "--model", "bad.py:F", "--data", "good.npz"),
        ),
    }
    # Nobody names 8 GB of nothing as the code of a network.
    code = {what: build for what, build in STRANGE.items() if build is not sparse}
    groups["model file"] = (
        code,
        "bad.py",
        ("finetune", "--model", "bad.py:F", "--data", "good.npz"),
    )
    for group, (builders, place, argv) in groups.items():
        for what, build in builders.items():
            yield f"{group}: {what}", place, at(place)(build), argv
    for build in (pickled, torch_pickled):
        yield f"weights: {build.__name__}", "w.pt", at("w.pt")(build), (*weights, "w.pt")


def prepare(folder: Path) -> None:
    """Good files of every kind, and a run that was stopped, for cases to spoil."""
    npz()(folder / "good.npz")
    (folder / "data.npz").write_bytes((folder / "good.npz").read_bytes())
    (folder / "w.safetensors").write_bytes((folder / "net.safetensors").read_bytes())
    net = runpy.run_path(str(folder / "nets.py"))["Net"](3)
    net.load_state_dict(load_file(folder / "net.safetensors"))
    fast.SourceCard.estimate(net.eval(), torch.rand(32, 1, 8, 8)).save(folder / "c.safetensors")
