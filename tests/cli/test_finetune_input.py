"""Unusual input of `fast finetune`: what is refused says so in a line, and writes nothing."""

import shutil

import numpy as np
import pytest

RUN = ("--steps", 30, "--eval-every", 10, "--lr", 0.01, "--output", "out")


def test_classes_without_samples_are_said(job):
    y = np.load("target.npz")["y_train"]
    changed(y_train=np.where(y == 3, 9, y))(job.folder)
    code, _, err = job.fast("finetune", *job.args, "--steps", 2)
    assert code == 0, err
    assert "--data target.npz: 6 of 10 classes have no training sample (3, 4, 5 and 3 more)" in err


def test_a_loss_that_is_not_finite_is_an_error_of_one_line(job):
    code, _, err = job.fast("finetune", *job.args, *RUN[:2], "--lr", 1e30, "--method", "vanilla")
    assert code == 2
    assert err.splitlines()[-1].startswith("fast: error: the loss is ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "/proc/x"], "--output /proc/x: cannot be written to"),
        (["--output", "nets.py"], "--output nets.py: is a file; name a folder"),
        (["--output", ""], "argument --output/-o: is empty; is a variable of the shell not set?"),
        (["--source-inputs", ""], "argument --source-inputs: is empty"),
        (["--forget-budget", "2%"], "--forget-budget needs --source-inputs to check on"),
        (
            ["--val-fraction", "1.5"],
            "argument --val-fraction: must be a share from 0 to less than 1, such as",
        ),
        (
            ["--val-fraction", "x"],
            "--val-fraction: must be a share from 0 to less than 1, such as 0.2; got 'x'",
        ),
        (["--steps", 10**20], "steps must be at most 10000000; got 100000000000000000000"),
        (["--seed", 2**70], f"seed must be at most {2**63 - 1}; got {2**70}"),
        (
            ["--forget-budget", 50],
            "points of source accuracy ('2%'), more than zero, and less than",
        ),
    ],
)
def test_options_are_looked_at_before_anything_is_read(job, monkeypatch, options, message):
    monkeypatch.setattr("fast.cli.commands.finetune.load_task", None)  # not called
    code, _, err = job.fast("finetune", *job.args, *options)
    assert code == 2
    (line,) = err.splitlines()
    assert message in line


def test_names_never_reach_the_terminal_raw(job):
    shutil.copy("target.npz", "evil\x1b[2J\nfast: error: .npz")
    args = [*job.args[:4], "--data", "evil\x1b[2J\nfast: error: .npz", "--steps", 2]
    code, out, err = job.fast("finetune", *args)
    assert code == 0, err
    assert "evil\\x1b[2J" in out
    assert "\x1b" not in out + err
    code, out, err = job.fast("finetune", *args[:4], "--data", "no\x1b[2J\x9b.npz")
    assert err.splitlines() == ["fast: error: no\\x1b[2J\\x9b.npz: no such file"]


@pytest.mark.parametrize("name", ["max-length", "input-size"])
def test_sizes_are_at_least_one(job, name):
    code, _, err = job.fast("finetune", *job.args, f"--{name}", 0)
    assert code == 2
    assert f"error: argument --{name}: must be a whole number of at least 1; got '0'" in err


def changed(**arrays):
    def write(folder):
        kept = dict(np.load(folder / "target.npz"))
        np.savez(
            folder / "target.npz", **{k: v for k, v in (kept | arrays).items() if v is not None}
        )

    return write


def truncate(name):
    def write(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-50])

    return write


def corrupt_folder(folder):
    for name in ("a", "b"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(5):
            (folder / "photos" / name / f"{i}.jpg").write_bytes(b"no image")


@pytest.mark.parametrize("dtype", [np.float64, np.longdouble, np.dtype(">f8"), np.float16])
def test_arrays_of_any_precision_and_byte_order(job, dtype):
    arrays = np.load("target.npz")
    features = {
        name: (value[:, None] / 255).astype(dtype) if name[0] == "x" else value.astype(">i2")
        for name, value in arrays.items()
    }
    np.savez("features.npz", **features)
    code, _, err = job.fast("finetune", *job.args[:4], "--data", "features.npz", "--steps", 2)
    assert code == 0, err


def keep(folder):
    pass


def named_folders(folder):
    image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")
    for name in ("cat", "dog"):
        (folder / "animals" / name).mkdir(parents=True)
        for i in range(4):
            image.new("L", (8, 8), 20 * i).save(folder / "animals" / name / f"{i}.png")


def floats(folder):
    arrays = np.load(folder / "target.npz")
    x = (arrays["x_train"][:, None] / 255).astype(np.float32)
    np.savez(folder / "floats.npz", x=x, y=arrays["y_train"] % 3)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (keep, ["--data", "no.npz"], "no.npz: no such file"),
        (keep, ["--data", "nothere"], "nothere: no such file or folder"),
        (keep, ["--device", "gpu"], "device 'gpu' cannot be used here: there is cpu"),
        (keep, ["--device", "cuda:99"], "device 'cuda:99' cannot be used here: there is cpu"),
        (keep, ["--device", "meta"], "device 'meta' cannot be used here: there is cpu"),
        (keep, ["--label-smoothing", 3], "--label-smoothing"),
        (keep, ["--seed", -1], "seed must not be negative; got -1"),
        (keep, ["--source-inputs", "no.npz"], "no.npz: no such file"),
        (keep, ["--card", "no.safetensors"], "no.safetensors: no such file"),
        (keep, ["--forget-budget", "lots"], "--forget-budget must be nats"),
        (keep, ["--forget-budget", "0.1"], "--forget-budget needs --source-inputs"),
        (changed(y_train=np.array(["a", "b", "c", "d"] * 50)), [], "class indices 0, 1, ...; got"),
        (keep, ["--data", "nets.py"], "nets.py: unknown file type '.py'"),
        (keep, ["--data", "source.npz"], "and no training split: give one"),
        (keep, ["--source", "target.npz"], "--source target.npz: labels must be 0..2, as the"),
        (named_folders, ["--source", "animals"], "--source animals: 2 classes with names (cat, d"),
        (
            keep,
            ["--input-column", "text"],
            "--input-column is for tables and Hugging Face data sets; target",
        ),
        (keep, ["--label-column", "y"], "--label-column is for tables and Hugging Face data sets"),
        (keep, ["--weights", "no.safetensors"], "no.safetensors: no such file"),
        (truncate("net.safetensors"), [], "net.safetensors: truncated"),
        (truncate("target.npz"), [], "target.npz: not a readable .npz"),
        (keep, ["--model", "nets.py:Net(9)"], "shapes differ: fc.weight is (3, 128)"),
        (keep, ["--model", "resnet18"], "must be timm:NAME"),
        (
            keep,
            ["--model", "nets.py:headless", "--allow-missing"],
            "none of its 9 tensors is",
        ),
        (keep, ["--mean", "0.5,0.5"], "mean has 2 values but the images have 1 channels"),
        (keep, ["--val-fraction", "2", "--data", "xy.npz"], "from 0 to less than 1"),
        (changed(y_train=np.full(200, np.nan)), [], "target.npz: y_train: 200 labels are NaN"),
        (changed(y_train=np.zeros(200, int), y_test=np.zeros(80, int)), [], "one class only"),
        (changed(y_test=np.full(80, 7), classes=["a", "b", "c", "d"]), [], "first 7 in row 0"),
        (changed(x_train=np.zeros((199, 8, 8), np.uint8)), [], "199 inputs but 200 labels"),
        (
            changed(x_train=np.zeros((200, 6), np.float32), x_test=np.zeros((80, 6), np.float32)),
            [],
            "--data: the network does not take these inputs ([2, 6]",
        ),
        (
            changed(x_test=np.zeros((80, 8, 8), np.float32)),
            [],
            "--data target.npz: the training split is images, the validation split an array of fl",
        ),
        (
            changed(x_test=np.zeros((80, 9, 8), np.uint8)),
            [],
            "training samples are [1, 8, 8], validation samples [1, 9, 8]; they must be of one sh",
        ),
        (floats, ["--data", "floats.npz", "--mean", "0.5"], "--mean is for images, and --data is"),
        (floats, ["--data", "floats.npz", "--input-size", 8], "--input-size is for images, and"),
        (floats, ["--source-inputs", "floats.npz", "--std", 1], "and --source-inputs is an array"),
        (changed(y_train=np.full(200, 2**40)), [], "label 1099511627776 among 280 samples"),
        (corrupt_folder, ["--data", "photos"], "photos/a/0.jpg: not a readable image"),
    ],
)
def test_bad_input_says_so_and_writes_nothing(job, spoil, options, message):
    np.savez("xy.npz", x=np.zeros((4, 8, 8), np.uint8), y=[0, 0, 1, 1])
    spoil(job.folder)
    before = sorted(p.name for p in job.folder.iterdir())
    code, _, err = job.fast("finetune", *job.args, *RUN, *options)
    assert code == 2
    assert message in err
    assert err.splitlines()[-1].startswith("fast: error: ")
    after = sorted(p.name for p in job.folder.iterdir() if p.name != "__pycache__")
    assert after == before
